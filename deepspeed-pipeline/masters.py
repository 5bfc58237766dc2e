"""The optimizer's state by the names of the parameters, and checkpoint files of it.

ZeRO-1 lays the fp32 masters of a stage's parameters in a row and divides the row among the data-parallel ranks. So a
rank holds pieces of parameters: most of them whole, the first and the last perhaps cut. A checkpoint has a folder for
each parameter, `state/NAME/`, and in it a file for each piece, `masters-0.pt`, named by the element that it begins
with. So any other grid of stages and ranks can resume from it, and a process without DeepSpeed can put the whole model
together. A tied parameter is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from common.checkpoints import copy_overlap

KINDS = ("masters", "exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """Elements `begin` to `end` of the flattened parameter `name`, in this rank's part of a group from `offset` on."""

    name: str
    begin: int
    end: int
    group: int
    offset: int
    is_copy: bool  # of a tied parameter, whose first stage has it as well

    def of(self, part: Tensor) -> Tensor:
        """This piece of `part`, which is this rank's part of the group: masters or moments."""
        return part[self.offset : self.offset + self.end - self.begin]


def pieces(zero, model: torch.nn.Module) -> Iterator[Piece]:
    """What this rank holds of `model` in DeepSpeed's optimizer `zero`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    rank = dist.get_rank(zero.dp_process_group)
    for group, parameters in enumerate(zero.bit16_groups):
        size = zero.partition_size[group]
        first, at = rank * size, 0
        for parameter in parameters:
            begin, end = max(at, first), min(at + parameter.numel(), first + size)
            if begin < end:
                yield Piece(names[parameter], begin - at, end - at, group, begin - first, parameter.ds_pipe_replicated)
            at += parameter.numel()


def write_state(zero, model: torch.nn.Module, folder: Path) -> int:
    """Write this rank's pieces of masters and moments to `folder`; returns how many steps AdamW has taken."""
    steps = 0
    for piece in pieces(zero, model):
        masters = zero.single_partition_of_fp32_groups[piece.group]
        parts = {"masters": masters.detach(), **zero.optimizer.state[masters]}
        steps = int(parts.get("step", 0))
        if piece.is_copy:
            continue
        (folder / piece.name).mkdir(parents=True, exist_ok=True)
        for kind in KINDS:
            if kind in parts:  # no moments if each step so far was skipped
                # A copy: of a view, torch.save would write all that it is a view of.
                part = piece.of(parts[kind]).to("cpu", copy=True)
                torch.save(part, folder / piece.name / f"{kind}-{piece.begin}.pt")
    return steps


def read_state(folder: Path, kind: str, name: str, into: Tensor, begin: int = 0) -> None:
    """Fill `into` with the elements of the flattened parameter `name` from `begin` on.

    `folder` holds what all ranks wrote with `write_state`. Files are mapped, not read whole.
    """
    for file in (folder / name).glob(f"{kind}-*.pt"):
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        copy_overlap(into, begin, saved, int(file.stem.split("-")[1]))


def load_state(zero, model: torch.nn.Module, folder: Path, steps: int) -> None:
    """Fill this rank's masters and moments from what `write_state` wrote after `steps` steps of AdamW."""
    if steps:  # else each so far was skipped, and AdamW has no moments yet
        for masters in zero.single_partition_of_fp32_groups:
            moments = {kind: torch.zeros_like(masters) for kind in KINDS[1:]}
            zero.optimizer.state[masters] = {"step": torch.tensor(float(steps), device=masters.device), **moments}
    for piece in pieces(zero, model):
        masters = zero.single_partition_of_fp32_groups[piece.group]
        for kind, part in {"masters": masters, **zero.optimizer.state[masters]}.items():
            if kind in KINDS:
                read_state(folder, kind, piece.name, piece.of(part), piece.begin)
    zero.update_lp_params()  # the weights, from their masters


def gather_masters(zero, model: torch.nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that gives the main process the whole fp32 master of a parameter, from all ranks' pieces of it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = {piece.name: piece for piece in pieces(zero, model) if not piece.is_copy}

    def gather(parameter: Tensor) -> Tensor:
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=device)
        if piece := held.get(names[parameter]):
            part = zero.single_partition_of_fp32_groups[piece.group]
            whole.view(-1)[piece.begin : piece.end] = piece.of(part)
        dist.reduce(whole, 0)  # each element is one rank's, and zero on all others
        return whole

    return gather
