"""A model whose parameters lie partitioned over the ranks, from its creation to its checkpoint (DeepSpeed ZeRO-3).

ZeRO-3 lays every parameter out in a row and cuts it into as many equal parts as there are ranks; the last is padded. A
rank keeps its part three times: in the type that the model computes with, as fp32 master, and as Adam's two moments.
"""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from common.checkpoints import copy_overlap

MOMENTS = ("exp_avg", "exp_avg_sq")


def partition_empty(model: torch.nn.Module, settings: dict, device: torch.device, dtype: torch.dtype) -> None:
    """Give `model`, which is on the `meta` device, parameters without values. No rank ever has more than one whole.

    `settings` are DeepSpeed's. A tied output head stays tied.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    if tied:
        head.weight = None
    model.to(dtype)
    for module in reversed(list(model.modules())):  # children before parents
        module.to_empty(device=device, recurse=False)
        if next(module.parameters(recurse=False), None) is not None:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=dtype)
    if tied:
        head.weight = embedding.weight


@torch.no_grad()
def deal_out(model: torch.nn.Module, zero, source: torch.nn.Module | None, device: torch.device) -> None:
    """Fill the partitioned `model` from rank 0's `source`, tensor by tensor; the other ranks have None.

    `zero` is DeepSpeed's optimizer. The masters get the values of the source, not what 16 bits leave of them.
    """
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.ds_shape, device=device)
        if source is not None:
            whole.copy_(source.get_parameter(name))
        dist.broadcast(whole, 0)
        part = torch.zeros(parameter.ds_tensor.numel(), device=device)
        begin = dist.get_rank() * len(part)
        values = whole.flatten()[begin : begin + len(part)]
        part[: len(values)] = values
        safe_set_local_fp32_param(parameter, part)
    weights_from_masters(zero)
    for name, buffer in model.named_buffers():  # not in 16 bits: positions would lose their precision
        shape = [source.get_buffer(name) if source is not None else None]
        dist.broadcast_object_list(shape, 0)
        buffer.data = shape[0].to(device)


def weights_from_masters(zero) -> None:
    """Bring the parts that the model computes with up to date with their masters, as DeepSpeed does after a step."""
    persistent = zero.persistent_parameters  # the small ones: whole on every rank, for they cost little
    if persistent:
        persistent[0].partition(persistent)
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if persistent:
        persistent[0].all_gather(persistent)


def own_parts(model: torch.nn.Module, zero) -> dict[str, dict[str, Tensor]]:
    """This rank's fp32 parts by kind (masters and, once there was a step, moments) and by parameter name."""
    parts = {"masters": {name: safe_get_local_fp32_param(p).detach() for name, p in model.named_parameters()}}
    if steps_done(zero):
        for kind in MOMENTS:
            parts[kind] = {name: safe_get_local_optimizer_state(p, kind) for name, p in model.named_parameters()}
    return parts


@torch.no_grad()
def load_parts(model: torch.nn.Module, zero, folder: Path, ranks: int, steps: int) -> None:
    """Put back what `own_parts` gave to each of `ranks` ranks, which may be another number than there are now.

    `folder` holds their `parts-<rank>.pt`; AdamW had made `steps` steps.
    """
    saved = [torch.load(folder / f"parts-{rank}.pt", mmap=True, weights_only=True) for rank in range(ranks)]
    if steps:
        for masters in zero.fp32_partitioned_groups_flat:
            state = zero.optimizer.state[masters]
            state["step"] = torch.tensor(float(steps), device=masters.device)
            state.update({kind: torch.zeros_like(masters) for kind in MOMENTS})
    for name, parameter in model.named_parameters():
        for kind in ("masters", *MOMENTS) if steps else ("masters",):
            part = _part_of([parts[kind][name] for parts in saved], parameter).to(parameter.ds_tensor.device)
            if kind == "masters":
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, kind)
    weights_from_masters(zero)


def steps_done(zero) -> int:
    """Steps that AdamW has made; those that the loss scaler skipped do not count."""
    return int(zero.optimizer.state[zero.fp32_partitioned_groups_flat[0]].get("step", 0))


def _part_of(saved: list[Tensor], parameter: torch.nn.Parameter) -> Tensor:
    """This rank's part of `parameter`, cut from the parts that some number of ranks saved, which in a row are all."""
    part = torch.zeros(parameter.ds_tensor.numel())
    at = 0
    for piece in saved:
        copy_overlap(part, dist.get_rank() * len(part), piece[: max(0, parameter.ds_numel - at)], at)
        at += len(piece)
    return part
