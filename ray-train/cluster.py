"""The Ray cluster of a run: started on this machine, or one that is there already; left as it was found.

Aligned with ray-tune/cluster.py; what differs has a comment why.
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

from common.config import REPOSITORY
from common.errors import UserError
from common.ray_address import check_address, joined, not_joined, without_hangup, worker_environment

OBJECT_STORE_BYTES = 100 * 2**20  # Ray's default is 30% of the memory; tensors never pass through Ray here
SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay where paths such as data.name=my.jsonl were meant
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # each line of a worker once
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a controller without GPUs: no warning
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # by default 2: the wait for the next report, and at the end
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "45",  # GPUs that another job holds: an error, not an endless wait
}


@contextlib.contextmanager
def ray_cluster() -> Iterator[dict[str, float]]:
    """Join the cluster of RAY_ADDRESS, or start one on this machine and stop it at the end; gives the resources.

    What is started ends with this process, also when it is killed. Raises `UserError` if no cluster answers at
    RAY_ADDRESS.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    address, folder = joined(), None
    options = {"logging_level": logging.ERROR, "log_to_driver": False}
    # Signals must stay with StopRequest's handlers, which Ray replaces.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if address:
            _join(address, options)
        else:
            # A process that asks whether the provider takes machines back; this one is not rented from the cluster.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            # In a folder of its own: Ray's "latest session" may be another run's. Not in $TMPDIR: a socket's path has
            # at most 107 characters.
            folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            with without_hangup():
                ray.init(
                    address="local",
                    # As for Ray's client: the current folder is then not put first on the workers' path, where a
                    # `train.py` of the user would be taken for ours.
                    job_config=JobConfig(runtime_env=worker_environment(), _client_job=True),
                    num_cpus=max(2, cores),  # two workers run on one core as well
                    num_gpus=torch.cuda.device_count(),
                    object_store_memory=OBJECT_STORE_BYTES,
                    # With the dashboard: Ray Train asks it for the state of the workers, and would wait half a minute
                    # for none.
                    _temp_dir=str(folder),
                    **options,
                )
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield ray.cluster_resources()
    finally:
        started = psutil.Process().children(recursive=True) if folder else []
        try:
            ray.shutdown()
        finally:  # even if one more Ctrl-C breaks that off; by themselves, Ray's agents notice it late
            for process in started:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if folder:
                shutil.rmtree(folder, ignore_errors=True)


def _join(address: str, options: dict) -> None:
    check_address(address)
    try:
        # The workers on other machines get this checkout's code, whatever is installed there.
        folder = Path(__file__).parent
        modules = [str(path) for path in (REPOSITORY / "common", *sorted(folder.glob("*.py")))]
        # Ray puts the current folder first on the workers' path: a `train.py` there would be taken for ours.
        with contextlib.chdir(folder):
            ray.init(address=address, runtime_env={"py_modules": modules}, **options)
    except Exception as error:  # whatever Ray's client makes of a port that something else listens at
        raise not_joined(address, error) from None


def place(workers: int, resources: dict[str, float]) -> tuple[int, bool]:
    """How many workers to start, and whether each has a GPU: `ray.workers`, or one per GPU, or two without GPUs.

    Raises `UserError` if the cluster cannot place that many.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    there, kind = (gpus, "GPU") if gpus else (cpus, "CPU")
    workers = workers or gpus or 2
    if workers > there:
        raise UserError(
            f"ray.workers={workers}: the cluster has {there} {kind}{'' if there == 1 else 's'}, and each worker takes "
            f"one: set ray.workers={max(there, 1)} or less, or add machines with `ray start`"
        )
    return workers, gpus > 0
