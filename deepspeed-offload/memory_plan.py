"""Memory preflight: what a run will take on the GPU and on the host, before anything is loaded.

The terms follow DeepSpeed 0.19.8's `deepspeed/runtime/zero/stage_1_and_2.py`, `host_buffers.py`, and what PyTorch keeps
for the backward. P: parameters, R: ranks, b: bytes of a weight on the GPU. What no formula gives are the constants in
capitals, measured on one H200 (`bench/offload.py` writes prediction and measurement into one record).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from common import models
from common.config import BaseConfig
from common.errors import UserError
from common.loss import chunk_size

GIB = 2**30
PROCESS = {
    "cuda": 4.2 * GIB,
    "cpu": 0.55 * GIB,
}  # of a rank without the model: Python, libraries, CUDA, data
LAUNCHER = 0.33 * GIB  # once per machine
# What one decoder layer keeps for its backward, and what that backward takes on top: values a token, as multiples of
# the model's width and of the width inside the MLP. Counted in transformers' Llama: two norms that compute in fp32, the
# inputs of seven matrices, query, key, value and result of the attention, four tensors in the MLP.
KEPT_WIDTHS, KEPT_INNER = 13, 4
BACKWARD_WIDTHS, BACKWARD_INNER = 2, 3
LOGITS = 1.0  # tensors of a chunk's logits that are there at a time: one if the loss is compiled
TIGHT = 0.9  # share of what there is, above which a warning is printed


@dataclass
class Model:
    """What the formulas ask of a model."""

    groups: list[list[int]]  # parameters of each tensor, by group of the optimizer
    largest: int  # of one tensor
    head: int  # the output matrix
    vocabulary: int
    width: int
    inner: int  # width inside the MLP
    layers: int

    @classmethod
    def of(cls, cfg: BaseConfig) -> Model:
        model = models.empty_model(cfg.model)
        groups = models.small_groups(
            models.parameter_groups(model, cfg.train.weight_decay), cfg.offload.group_millions * 1e6
        )
        config, head = model.config, model.get_output_embeddings().weight
        inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
        return cls(
            groups=[[p.numel() for p in group["params"]] for group in groups],
            largest=max(p.numel() for p in model.parameters()),
            head=head.numel(),
            vocabulary=len(head),
            width=config.hidden_size,
            inner=inner,
            layers=config.num_hidden_layers,
        )

    @property
    def parameters(self) -> int:
        return sum(sum(group) for group in self.groups)


def gpu_bytes(model: Model, settings: dict, b: int, tokens: int, checkpointing: bool) -> dict[str, float]:
    """Bytes on each GPU by purpose, at the moment of the step that takes the most. `tokens`: of one micro-batch."""
    zero = settings["zero_optimization"]
    bucket = min(zero.get("reduce_bucket_size", 5e8), model.parameters)
    hidden = tokens * model.width
    kept = KEPT_WIDTHS * hidden + KEPT_INNER * tokens * model.inner
    backward = BACKWARD_WIDTHS * hidden + BACKWARD_INNER * tokens * model.inner
    inputs = (model.layers + 1) * hidden if checkpointing else model.layers * kept
    chunk = chunk_size(tokens, model.vocabulary) * model.vocabulary
    phases = {
        # The head's gradient is summed in fp32 while a chunk's logits are there; hidden states in and out.
        "loss": b * inputs + 4 * model.head + LOGITS * b * chunk + 5 * b * hidden,
        # One layer again (with checkpointing) and backward; the head's gradient, which waits for the embedding's if
        # they are tied; gradients in buckets: one that fills, one that leaves (overlap_comm), one that is summed.
        "layers": b * (inputs + backward + (kept if checkpointing else 0) + model.head)
        + b * bucket * (3 if zero.get("overlap_comm") else 2),
        # The embedding's gradient: the head's part, its own, their sum, and what the reduction takes, which was
        # measured as three copies more (half a copy above that with DeepSpeed's own buffers).
        "embedding": 6 * b * model.head,
    }
    step = max(phases, key=phases.get)
    return {
        "weights": b * model.parameters,
        "a gradient that is added up": b * model.largest,  # temp_grad_buffer_for_gpu_offload
        f"step ({step})": phases[step],
    }


def own_buffers(settings: dict) -> bool:
    """Whether DeepSpeed's host buffers stay as they are (`pin_memory: true`), or `host_buffers.py` shares them."""
    return settings["zero_optimization"]["offload_optimizer"].get("pin_memory", True)


def host_bytes(model: Model, settings: dict, b: int, ranks: int, local_ranks: int, device: str) -> dict[str, float]:
    """Bytes on one machine by purpose, all its ranks together, in training; load and export take less."""
    own, accumulates = own_buffers(settings), settings["gradient_accumulation_steps"] > 1

    def buffer(size: int) -> int:  # page-locked by PyTorch's allocator, which rounds up to powers of two
        return 1 << (size - 1).bit_length() if own and device == "cuda" else size

    def buffers(size: int) -> int:
        """One of `size` bytes per parameter for each group, on all ranks of the machine."""
        return local_ranks * sum(buffer(size * -(-sum(group) // ranks)) for group in model.groups)

    parts = {"masters": buffers(4), "moments": local_ranks * 8 * model.parameters / ranks}
    if own:
        # The 16-bit buffers, one for each group, and one more for nothing: the allocator keeps what is let go.
        parts |= {"gradients": buffers(4), "new weights": buffers(b) + local_ranks * buffer(b * model.largest)}
        earlier = buffers(b)
    else:
        parts["gradients and new weights"] = buffers(b)
        earlier = b * sum(divided(group, ranks) for group in model.groups) * local_ranks / ranks
    return parts | {
        "gradients of earlier micro-batches": earlier if accumulates else 0,
        "processes": local_ranks * PROCESS[device] + (LAUNCHER if "RANK" in os.environ else 0),
    }


def divided(group: list[int], ranks: int) -> int:
    """Parameters of the tensors that do not lie in one rank's part of `group`, once for each rank that has a piece."""
    part, begin, total = -(-sum(group) // ranks), 0, 0
    for size in group:
        pieces = (begin + size - 1) // part - begin // part + 1
        total += pieces * size if pieces > 1 else 0
        begin += size
    return total


def check_memory(cfg: BaseConfig, settings: dict, device: torch.device, dtype: torch.dtype, ranks: int) -> dict:
    """The prediction for this run, in GiB, as it goes into environment.json.

    Raises `UserError` if the GPU or the host has less, with how much is missing and what to change; prints a
    warning if it will be tight.
    """
    model, b = Model.of(cfg), torch.empty(0, dtype=dtype).element_size()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    tokens = cfg.train.micro_batch_size * cfg.data.max_length
    gpu = gpu_bytes(model, settings, b, tokens, cfg.train.activation_checkpointing)
    host = host_bytes(model, settings, b, ranks, local_ranks, device.type)
    if device.type == "cpu":  # what a GPU would hold is in host memory as well
        host |= {name: local_ranks * size for name, size in gpu.items()}
        gpu = {}
    smaller = [f"train.micro_batch_size={cfg.train.micro_batch_size // 2}"] if cfg.train.micro_batch_size > 1 else []
    if not cfg.train.activation_checkpointing:
        smaller.append("train.activation_checkpointing=true")
    smaller.append(f"data.max_length={cfg.data.max_length // 2}")
    plan = {}
    if gpu:
        plan["gpu"] = _compare("GPU", gpu, gpu_memory(cfg, device), [*smaller, "a smaller model"])
    less = []
    if own_buffers(settings):
        less.append("zero_optimization.offload_optimizer.pin_memory=false in the file of offload.ds_config")
    if device.type == "cpu":
        less += smaller
    own = psutil.Process().memory_info().rss * local_ranks  # counted in the prediction, and gone from what is free
    plan["host"] = _compare("host", host, host_memory() + own, [*less, "a smaller model", "a machine with more memory"])
    return plan


def _compare(place: str, parts: dict[str, float], there: float, remedies: list[str]) -> dict:
    needed = sum(parts.values())
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
    if needed > there:
        raise UserError(
            f"{place} memory: this run needs about {needed / GIB:.1f} GiB ({listed}) and {there / GIB:.1f} GiB are "
            f"there: {(needed - there) / GIB:.1f} GiB too little. Try {', or '.join(remedies)}"
        )
    if needed > TIGHT * there and int(os.environ.get("RANK", 0)) == 0:
        print(
            f"warning: {place} memory will be tight: about {needed / GIB:.1f} of {there / GIB:.1f} GiB ({listed}). If "
            f"that is too tight, try {', or '.join(remedies)}",
            file=sys.stderr,
        )
    rounded = {name: round(size / GIB, 3) for name, size in parts.items()}
    return {"predicted_gib": round(needed / GIB, 3), "available_gib": round(there / GIB, 3), "parts_gib": rounded}


def gpu_memory(cfg: BaseConfig, device: torch.device) -> float:
    """Bytes that this process may take on its GPU."""
    free = torch.cuda.mem_get_info(device)[0]
    limit = cfg.runtime.gpu_memory_limit_gib * GIB
    return min(free, limit) if limit else free


def host_memory(root: Path = Path("/")) -> float:
    """Bytes of host memory that are free for this run: of the machine, and of the cgroup (container) it is in."""
    free = [psutil.virtual_memory().available]
    cgroups = root / "sys/fs/cgroup"
    # Version 2 and version 1: the limit, what is in use, and the name of the part that the system would release.
    # A container sees its own cgroup at the root; a service finds its own below it.
    own = _own_cgroups(root)
    for folder in {cgroups / own.get("", "."), cgroups}:
        free.append(_left(folder / "memory.max", folder / "memory.current", folder / "memory.stat", "inactive_file"))
    for folder in {cgroups / "memory" / own.get("memory", "."), cgroups / "memory"}:
        files = [folder / f"memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")]
        free.append(_left(*files, "total_inactive_file"))
    return min(size for size in free if size is not None)


def _own_cgroups(root: Path) -> dict[str, str]:
    """The cgroup of this process for each controller; "" is version 2's."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return {}
    fields = [line.split(":", 2) for line in lines]
    return {controller: path.lstrip("/") for _, controllers, path in fields for controller in controllers.split(",")}


def _left(limit: Path, used: Path, statistics: Path, cache: str) -> float | None:
    """None if there is no limit (version 2 has `max`, version 1 a number near 2^63)."""
    try:
        most = int(limit.read_text())
        stat = dict(line.split() for line in statistics.read_text().splitlines())
        return most - int(used.read_text()) + int(stat.get(cache, 0)) if most < 2**60 else None
    except (OSError, ValueError):
        return None
