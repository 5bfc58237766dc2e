"""The optimizer's state by the names of the parameters, and checkpoint files of it.

ZeRO-1 lays the fp32 masters of a stage's parameters in a row and deals the row out to the data-parallel ranks. So a
rank holds pieces of parameters: most of them whole, the first and the last perhaps cut. A checkpoint has one file a
rank with its pieces by name. Whoever reads looks pieces up by name, so that any other grid of stages and ranks can go
on from it, and a process without DeepSpeed can put the whole model together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

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


def write_state(zero, model: torch.nn.Module, path: Path) -> int:
    """Write this rank's masters and moments to `path`; returns how many steps AdamW has taken."""
    state: dict[str, dict[str, tuple[int, Tensor]]] = {kind: {} for kind in KINDS}
    steps = 0
    for piece in pieces(zero, model):
        masters = zero.single_partition_of_fp32_groups[piece.group]
        parts = {"masters": masters.detach(), **zero.optimizer.state[masters]}
        steps = int(parts.get("step", 0))
        if not piece.is_copy:
            for kind in KINDS:
                if kind in parts:  # no moments where each step so far was skipped
                    state[kind][piece.name] = piece.begin, piece.of(parts[kind])
    torch.save(state, path)
    return steps


class SavedState:
    """What `ranks` ranks wrote with `write_state` to `folder`/state-RANK.pt. Files are mapped, not read whole."""

    def __init__(self, folder: Path, ranks: int):
        files = [folder / f"state-{rank}.pt" for rank in range(ranks)]
        self._states = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]

    def read(self, kind: str, name: str, into: Tensor, begin: int = 0) -> None:
        """Fill `into` with the elements of the flattened parameter `name` from `begin` on."""
        end = begin + len(into)
        for state in self._states:
            if name in state[kind]:
                at, saved = state[kind][name]
                first, last = max(begin, at), min(end, at + len(saved))
                if first < last:
                    into[first - begin : last - begin] = saved[first - at : last - at]
