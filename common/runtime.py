"""The machine: precision, memory limits, seeds, signals, and a description of it all."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import random
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch

from common.config import REPOSITORY, BaseConfig, RuntimeConfig
from common.errors import UserError

LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub", "deepspeed", "ray", "llm-foundry",
             "mosaicml", "mlflow", "wandb")  # fmt: skip
MOST_SKIPPED_STEPS = 5
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_precision(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute type for `train.precision` on `device`, and the reason for it. Master weights stay fp32 in all cases.

    Goes by compute capability: a T4 reports bf16 support, but only emulates it (pytorch/pytorch#148322).
    Raises `UserError` for bf16 on a GPU that has none.
    """
    if device.type != "cuda":
        name = "fp32" if precision == "auto" else precision
        return DTYPES[name], f"{name}: {'the default on a CPU' if precision == 'auto' else 'as set'}"
    capability = torch.cuda.get_device_capability(device)
    gpu = f"{torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]}"
    if precision == "bf16" and capability < (8, 0):
        raise UserError(f"train.precision=bf16: {gpu}, has no bf16 (it needs 8.0); set train.precision=fp16 or auto")
    if precision == "auto":
        name = "bf16" if capability >= (8, 0) else "fp16"
        return DTYPES[name], f"{name}: {gpu}, {'has' if name == 'bf16' else 'has no'} bf16"
    return DTYPES[precision], f"{precision}: as set"


def check_process_count() -> None:
    """Raise `UserError` if a launcher started more processes on this machine than it has GPUs, or shares of them."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if share := os.environ.get("GPU_SHARE"):  # from launchers/gpu_share.py: this process sees one GPU, or none
        if not gpus:
            raise UserError(f"no GPU for one of {processes} processes, which has {share}: set NPROC_PER_NODE lower")
    elif gpus and processes > gpus:
        raise UserError(f"{processes} processes for {gpus} GPUs: start with --nproc_per_node {gpus} or fewer")


def launcher_pid() -> int:
    """The first process of the run on this machine, whose tree takes the host memory: its launcher, or this process."""
    if "RAY_RAYLET_PID" in os.environ:  # a worker of Ray's: all workers of a machine are below its raylet
        return int(os.environ["RAY_RAYLET_PID"])
    if "LOCAL_SIZE" in os.environ:  # DeepSpeed's launcher is a chain of two
        return psutil.Process(os.getppid()).ppid()
    launched = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.keys() >= {"NODE_RANK", "MASTER_PORT"}  # Composer's
    return os.getppid() if launched else os.getpid()


def command_started_at() -> float:
    """When the command that this process belongs to was started: its launcher, or this process. Seconds since 1970."""
    return psutil.Process(launcher_pid()).create_time()


def check_device(cfg: BaseConfig, device: torch.device) -> None:
    """Raise `UserError` for a GPU as `check_gpu` does, and for a CPU that `runtime.allow_cpu=false` rules out."""
    if device.type == "cpu" and not cfg.runtime.allow_cpu and not cfg.model.name.startswith("tiny:"):
        raise UserError(
            f"no GPU found, and model.name={cfg.model.name} would train for days on a CPU: on Kaggle choose Settings → "
            f"Accelerator → GPU T4 x2; --config smoke.yaml is the run for a CPU; to start this one all the same, set "
            f"runtime.allow_cpu=true"
        )
    check_gpu(device)


def check_gpu(device: torch.device) -> None:
    """Raise `UserError` for a GPU that the installed torch has no code for (a P100 under current builds, say)."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    built_for = torch.cuda.get_arch_list()  # such as sm_75, sm_90a, compute_120
    for arch in built_for:
        kind, number = arch.rstrip("af").split("_")
        version = divmod(int(number), 10)
        # Machine code runs on its own major version from its minor version up, PTX on everything newer.
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return
    raise UserError(
        f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]}) is not supported "
        f"by torch {torch.__version__}, which is built for {', '.join(built_for)}: on Kaggle choose GPU T4 x2"
    )


def limit_gpu_memory(runtime: RuntimeConfig, device: torch.device) -> None:
    """Let this process allocate at most `runtime.gpu_memory_limit_gib`: to try what fits a small GPU."""
    if runtime.gpu_memory_limit_gib and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        if runtime.gpu_memory_limit_gib > total:
            raise UserError(f"runtime.gpu_memory_limit_gib={runtime.gpu_memory_limit_gib}: the GPU has {total:.1f} GiB")
        torch.cuda.set_per_process_memory_fraction(runtime.gpu_memory_limit_gib / total, device.index or 0)


@contextlib.contextmanager
def explain_out_of_memory(cfg: BaseConfig) -> Iterator[None]:
    """Turn PyTorch's out-of-memory error into a `UserError` that names settings that need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = []
        if cfg.train.micro_batch_size > 1:
            smaller.append(f"train.micro_batch_size={cfg.train.micro_batch_size // 2}")
        if not cfg.train.activation_checkpointing:
            smaller.append("train.activation_checkpointing=true")
        smaller.append(f"data.max_length={cfg.data.max_length // 2}")
        raise UserError(f"{str(error).split('. GPU')[0]}. Try {', or '.join(smaller)}") from None


def check_finite(step: int, loss: float, skipped: int) -> None:
    """Raise `UserError` if the loss is not finite, or the fp16 loss scaler skipped MOST_SKIPPED_STEPS in a row."""
    advice = "try train.precision=bf16 or fp32, a lower train.learning_rate, or more train.warmup_steps"
    if not math.isfinite(loss):
        raise UserError(f"the loss of step {step} is {loss}: {advice}")
    if skipped >= MOST_SKIPPED_STEPS:
        raise UserError(f"step {step}: gradients overflowed fp16 in {skipped} steps in a row: {advice}")


def only_main_shows_progress(is_main: bool) -> None:
    """Silence the libraries' progress bars: those of short work everywhere, those of downloads on all ranks but one.

    And torch's warnings about things that are right here: each process has set its device before the first barrier, the
    thread that runs the backward gets its CUDA context as it starts, and DeepSpeed 0.19 uses names that torch 2.13 has
    replaced.
    """
    import datasets
    import huggingface_hub.utils
    import transformers

    for message in (
        r"barrier\(\): using the device",
        "Attempting to run cuBLAS, but there was no current CUDA",
        ".*(all_gather_into_tensor|reduce_scatter_tensor)",
    ):
        warnings.filterwarnings("ignore", message)
    transformers.utils.logging.disable_progress_bar()
    if not is_main:
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy (which takes 32 bits) and PyTorch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def save_rng(folder: Path, rank: int) -> None:
    """Write every random number generator of this process to `folder`."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],  # types that weights_only accepts
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    torch.save(state, folder / f"rng-{rank}.pt")


def load_rng(folder: Path, rank: int) -> None:
    """Restore what `save_rng` wrote, if there was such a rank; the GPU's part only if this process has a GPU."""
    if not (file := folder / f"rng-{rank}.pt").exists():
        return
    state = torch.load(file, weights_only=True)
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class StopRequest:
    """Notices that the run should stop: SIGTERM, Ctrl-C, a lost terminal, or `runtime.max_hours` from now on.

    `reason` is None until then. A second Ctrl-C stops at once.
    """

    def __init__(self, runtime: RuntimeConfig):
        self._deadline = time.time() + runtime.max_hours * 3600 if runtime.max_hours else float("inf")
        self._max_hours = runtime.max_hours
        self.signal_name = ""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(signal.SIGHUP, self._on_signal)

    @property
    def reason(self) -> str | None:
        if self.signal_name:
            return self.signal_name
        return f"runtime.max_hours={self._max_hours} is over" if time.time() > self._deadline else None

    def _on_signal(self, number: int, frame: object) -> None:
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name


def describe_environment(world_size: int, precision: str) -> dict:
    """What a figure of this run depends on in addition to its configuration; written to `environment.json`."""
    versions = {}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    gpus = []
    for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count())):
        memory = round(gpu.total_memory / 2**30, 1)
        gpus.append({"name": gpu.name, "memory_gib": memory, "multiprocessors": gpu.multi_processor_count})
    return {
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "gpu_share": os.environ.get("GPU_SHARE", ""),  # of rank 0, such as "1/2 of GPU 0"; empty: all of a GPU
        "cpu_cores": os.cpu_count(),
        "host_memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "world_size": world_size,
        "precision": precision,
        "git_commit": git_commit(),
        "started_at": command_started_at(),
    }


def git_commit() -> str | None:
    """The commit, followed by "with local changes" if tracked files differ from it; None without Git.

    `results/` and recorded notebooks do not count: measuring and recording write them.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return (
            f"{commit} with local changes"
            if commit and git("diff", "--name-only", "HEAD", "--", ".", ":!results", ":!*.ipynb")
            else commit or None
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
