"""What PyTorch's CPU backend and a model's code make necessary around FSDP; none of it is part of the lesson."""

from __future__ import annotations

import time
import warnings

import torch
import torch.distributed as dist

from common.errors import UserError


def check_gloo_averages() -> None:
    """Raise `UserError` if Gloo sums when it is asked to average, as that of torch 2.7 does. Every rank calls this."""
    averaged = torch.zeros(1)
    reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # its name since torch 2.13
    reduce_scatter(averaged, torch.ones(dist.get_world_size()), dist.ReduceOp.AVG)
    if averaged != 1:
        raise UserError(f"torch {torch.__version__} cannot average gradients over CPU processes: install a later one")


def ignore_view_warning() -> None:
    """OPT's layers return a view: torch warns that changing it in place would break the backward. Nothing does."""
    warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)


def wait_for_gloo() -> None:
    """Gloo's threads let go of the last gathered tensors some time after the ranks have them.

    Python before 3.14 aborts if that happens while it shuts down.
    """
    time.sleep(1)
