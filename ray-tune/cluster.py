"""Ray itself: a cluster of this machine, started for the search and gone with it, or the one that RAY_ADDRESS names."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from common.config import BaseConfig
from common.errors import UserError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the configuration stay what they are
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # each trial has its metrics.jsonl
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # a Ctrl-C is ours: trials save first
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # Ray's default notes its state every 10 s
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def gpu_share(cfg: BaseConfig) -> float:
    """The share of a GPU that a trial asks Ray for; none on a machine without."""
    return cfg.search.gpus_per_trial if torch.cuda.device_count() or os.environ.get("RAY_ADDRESS") else 0.0


def slots(cfg: BaseConfig) -> int:
    """Trials that run at a time. Raises `UserError` where a trial asks for more GPUs than it can use."""
    gpus, share = torch.cuda.device_count(), cfg.search.gpus_per_trial
    if share > max(gpus, 1):
        raise UserError(f"search.gpus_per_trial={share:g}, but this machine has {gpus} GPUs: set it to 1 or a fraction")
    if share > 1:
        raise UserError(f"search.gpus_per_trial={share:g}: a trial computes on one GPU; set it to 1 or a fraction")
    most = int(gpus * int(1 / share)) or 2
    return min(cfg.search.concurrent_trials or most, most) if gpus else cfg.search.concurrent_trials or most


def share_cores(slots: int) -> None:
    """Without a GPU: share the cores out to PyTorch's threads of each trial. The final run counts with as many."""
    if not torch.cuda.device_count():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // slots)))
        torch.set_num_threads(int(threads))


@contextlib.contextmanager
def start(root: Path, slots: int) -> Iterator[None]:
    """Ray with room for `slots` trials. All its processes end with this one, also when it is killed."""
    import ray

    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    # No more trials than can run wait at Ray's door: of those, it takes any.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    note = root / "ray-folder"
    if note.is_file():  # of a search that was killed
        shutil.rmtree(note.read_text(encoding="utf-8"), ignore_errors=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    options = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    if "RAY_ADDRESS" in os.environ:
        ray.init(address=os.environ["RAY_ADDRESS"], **options)
        folder = None
    else:
        # NOTE: short, since the paths of its sockets may have 107 bytes; not Ray's own folder, which all users share.
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        note.write_text(folder, encoding="utf-8")
        ray.init(address="local", num_cpus=slots, include_dashboard=False, _temp_dir=folder, **options)
    for number, handler in handlers.items():  # Ray puts its own in their place, which end this process at once
        signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
            note.unlink()
