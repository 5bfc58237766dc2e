"""The global gradient norm of all stages, summed at once.

DeepSpeed 0.19.8 (`deepspeed/runtime/zero/stage_1_and_2.py`, `get_grad_norm_direct`) reduces the norm of every parameter
group over the stages by itself. Stages that have different numbers of groups then wait for each other forever, or sum
the norms of groups that do not belong together. Here each rank adds up what it has, and one reduction does the rest.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

SLICE = 2**23  # elements


def sum_once(zero) -> None:
    """Make DeepSpeed's optimizer `zero` take the global norm from `global_norm`, for any groups on any stage."""
    zero.scaled_global_norm = lambda: global_norm(zero)


def global_norm(zero) -> Tensor:
    """The norm of the whole model's gradients (× the loss scale), each element once: not of a tied parameter's copies.

    In fp64: PyTorch's fp32 norm of millions of elements is off by percents on a CPU. Slice by slice, for on a GPU the
    slice is copied to fp64 first: of a 128k embedding that would be 2 GiB.
    """
    squares = torch.zeros((), dtype=torch.float64, device=zero.device)
    for group, parameters in enumerate(zero.params_in_partition):
        # After the gradients of this rank's parameters there may be padding.
        for gradient, parameter in zip(zero.averaged_gradients[group], parameters, strict=False):
            if not parameter.ds_pipe_replicated:
                for part in gradient.flatten().split(SLICE):
                    squares += torch.linalg.vector_norm(part, dtype=torch.float64).square()
    dist.all_reduce(squares)
    return squares.sqrt().float()
