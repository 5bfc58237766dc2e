"""The Ray cluster of a search: started on this machine, or one that is there already; left as it was found.

Aligned with ray-train/cluster.py; what differs has a comment why.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray
import torch
from ray.job_config import JobConfig

from common.config import REPOSITORY, BaseConfig
from common.errors import UserError
from common.ray_address import check_address, joined, not_joined, without_hangup, worker_environment
from common.runtime import check_device

SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # trials stay where paths such as model.name=my-model were meant
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a trial without a GPU: no warning
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # each trial has its metrics.jsonl
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # a Ctrl-C is ours: trials save first
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # Ray's default notes its state every 10 s
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@contextlib.contextmanager
def ray_cluster(cfg: BaseConfig, root: Path) -> Iterator[tuple[int, float]]:
    """Join the cluster of RAY_ADDRESS, or start one on this machine and stop it at the end; gives what `place` does.

    What is started ends with this process, also when it is killed. Raises `UserError` if no cluster answers at
    RAY_ADDRESS, and as `place`.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    address, folder, note = joined(), None, root / "ray-folder"
    options = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    # Tune's loop runs in this thread: signals must stay with StopRequest's handlers, which Ray replaces.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if address:
            _join(address, options)
            placed = place(cfg, ray.cluster_resources())
        else:
            placed = place(cfg, this_machine())
            if note.is_file():  # of a search that was killed; nobody else uses it, since a search locks its folder
                shutil.rmtree(note.read_text(encoding="utf-8"), ignore_errors=True)
            # In a folder of its own: Ray's "latest session" may be another run's. Not in $TMPDIR: a socket's path has
            # at most 107 characters.
            folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
            note.write_text(str(folder), encoding="utf-8")
            with without_hangup():
                ray.init(
                    address="local",
                    # As for Ray's client: the current folder is then not put first on the workers' path, where a
                    # `train.py` of the user would be taken for ours.
                    job_config=JobConfig(runtime_env=worker_environment(), _client_job=True),
                    num_cpus=placed[0],  # each trial takes one: no more of them run, whatever the machine has
                    num_gpus=torch.cuda.device_count(),
                    include_dashboard=False,  # Tune, unlike Ray Train, asks nothing of it
                    # The object store has Ray's own size, unlike ray-train's: the tokenized rows lie in it.
                    _temp_dir=str(folder),
                    **options,
                )
        for number, handler in handlers.items():
            signal.signal(number, handler)
        # No more trials than can run wait at Ray's door: of those, it takes any.
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(placed[0])
        yield placed
    finally:
        started = psutil.Process().children(recursive=True) if folder else []
        try:
            ray.shutdown()
        finally:  # even if one more Ctrl-C breaks that off
            for process in started:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
                note.unlink()


def _join(address: str, options: dict) -> None:
    # `check` has asked at the address already, before anything was loaded.
    try:
        # The workers on other machines get this checkout's code, whatever is installed there.
        folder = Path(__file__).parent
        modules = [str(path) for path in (REPOSITORY / "common", *sorted(folder.glob("*.py")))]
        # Ray puts the current folder first on the workers' path: a `train.py` there would be taken for ours.
        with contextlib.chdir(folder):
            ray.init(address=address, runtime_env={"py_modules": modules}, **options)
    except Exception as error:  # whatever Ray's client makes of a port that something else listens at
        raise not_joined(address, error) from None


def this_machine() -> dict[str, float]:
    """The resources of a cluster that is started here: its GPUs, or two trials at a time."""
    return {"CPU": 2, "GPU": torch.cuda.device_count()}


def place(cfg: BaseConfig, resources: dict[str, float]) -> tuple[int, float]:
    """(trials that run at a time, the share of a GPU that each asks Ray for: 0 in a cluster without GPUs).

    Raises `UserError` if a trial asks for more GPUs than it can use.
    """
    gpus, share, most = int(resources.get("GPU", 0)), cfg.search.gpus_per_trial, cfg.search.concurrent_trials
    where = "the cluster" if joined() else "this machine"
    if share > max(gpus, 1):
        raise UserError(f"search.gpus_per_trial={share:g}, but {where} has {gpus} GPUs: set it to 1 or a fraction")
    if share > 1:
        raise UserError(f"search.gpus_per_trial={share:g}: a trial computes on one GPU; set it to 1 or a fraction")
    if not gpus and not joined():  # processes on cores: as many as are asked for
        return most or int(resources["CPU"]), 0.0
    room = gpus * int(1 / share) if gpus else int(resources.get("CPU", 0))
    return min(most or room, room), share if gpus else 0.0


def check(cfg: BaseConfig) -> None:
    """What can be checked before anything is loaded; raises `UserError` as `ray_cluster` would.

    Without a GPU, the cores are divided among the trials' PyTorch threads, and the final run counts with as many.
    """
    if joined():
        return check_address(joined())
    slots, _ = place(cfg, this_machine())
    if not torch.cuda.device_count():
        check_device(cfg, torch.device("cpu"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // slots)))
        torch.set_num_threads(int(threads))
