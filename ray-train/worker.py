"""A worker's dealings with Ray: its start, where it resumes after a failure, and the checkpoints."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer

from common.checkpoints import Checkpoints


def nodes() -> list[str]:
    """The machine of every rank and Ray's name for it; every rank calls this."""
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, f"{platform.node()} {node[:8]}".strip())
    return found


def where_to_resume(resume: str) -> str:
    """`checkpoint.resume`; another one if Ray has restarted the workers of a run that has saved already."""
    if not (known := ray.train.get_checkpoint()):
        return resume
    # The newest on the disk may be one that Ray has not heard of yet. But if the run went back to an earlier one by its
    # path, the newest may belong to another run.
    return "auto" if resume in ("auto", "never") else known.path


def kept_by_us(keep: int) -> int:
    """How many checkpoints `Checkpoints` keeps for `checkpoint.keep`: all in a cluster, as Ray deletes there."""
    return sys.maxsize if ray.is_initialized() else keep


def report(folder: Path) -> None:
    """Report a checkpoint to Ray; every rank calls this. Ray deletes the oldest if there are more than checkpoint.keep.

    NOTE: Ray would copy what each rank hands over into its storage. This folder lies there already, under its own name,
    and it came there by a rename: it is complete, even if a worker dies while it writes.
    """
    known = {checkpoint.checkpoint.path for checkpoint in ray.train.get_all_reported_checkpoints()}
    if str(folder) not in known:  # a step that was made again after a failure has its old place
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        mode = ray.train.CheckpointUploadMode.NO_UPLOAD
        ray.train.report({}, checkpoint=checkpoint, checkpoint_upload_mode=mode)


def report_earlier(checkpoints: Checkpoints, first_step: int) -> None:
    """Report to Ray the checkpoints that an earlier start left, so that it counts them; every rank calls this."""
    there = [[folder for step, folder in reversed(checkpoints.all()) if step <= first_step]]
    dist.broadcast_object_list(there)
    for folder in there[0]:
        report(folder)


def run_without_cluster(loop: Callable, config: dict) -> int:
    """Call `loop(config)` in this process, which a launcher has started: Ray's local mode. Returns the exit code."""
    os.environ.setdefault("LOCAL_RANK", "0")  # Ray joins the launcher's process group only if all of them are set
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    scaling = ray.train.ScalingConfig(num_workers=0, use_gpu=torch.cuda.is_available())
    TorchTrainer(loop, train_loop_config=config, scaling_config=scaling).fit()
    return 0
