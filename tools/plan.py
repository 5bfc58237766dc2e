"""What a run needs, and how long it may take, on this machine: known in seconds, before weights are downloaded.

    python -m tools.plan pytorch-ddp [--config FILE] [key=value ...]

The notebooks call it before they launch a run. It ends with one `error:` line if the run cannot work here: no GPU, or
one that torch has no code for; no internet, token or access; too little memory or disk. Of the Hub it reads the model's
`config.json` and whether the dataset is there. What it says of memory is a lower bound; of time, an estimate.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import psutil
import torch
from huggingface_hub import constants
from transformers import PreTrainedModel

from common import errors, models, runtime
from common.config import REPOSITORY, BaseConfig, get, parse_config
from common.errors import UserError
from common.hub import check_can_push, explain_hub_error, is_hub_id, token
from common.metrics import PEAK_TFLOPS, flops_per_token
from tools import notebook

GIB, GB = 2**30, 1e9
CHOOSE_TWO = "on Kaggle choose Settings → Accelerator → GPU T4 x2"


@dataclass(frozen=True)
class Needs:
    """What a project takes per parameter: weights, gradients and AdamW's moments in fp32 are 16 bytes."""

    gpu: float  # bytes on all GPUs together, if `sharded`, or on each
    sharded: bool
    host: float  # bytes, all processes together, as measured (`peak_host_gib` of the records in results/)
    step: float = 0  # bytes that each GPU sends in an optimizer step
    micro_batch: float = 0  # and those with every micro-batch
    on_host: float = 0  # bytes that AdamW reads and writes in host memory in a step
    disk: float = 0  # bytes of an environment of its own


PROJECTS = {
    "pytorch-ddp": Needs(16, False, 8, step=4),
    "pytorch-fsdp": Needs(16, True, 15, micro_batch=8),
    "deepspeed-offload": Needs(2, False, 17, step=4, on_host=32),
    "deepspeed-pipeline": Needs(16, True, 8),
    "llm-foundry-finetune": Needs(16, True, 14, micro_batch=8, disk=7e9),
    "ray-train": Needs(16, True, 8, micro_batch=8),
    "ray-tune": Needs(16, False, 8),
}
PROCESS = 2 * GIB  # of host memory, without a model: Python, libraries, CUDA
SERVED = 0.25  # of the data sheet's FLOP/s: assumed of fp16 on a T4, whose clock falls at its 70 W
HOST_BANDWIDTH = 15e9  # bytes/s, four cores
PCIE, NVLINK = 5e9, 100e9  # bytes/s between GPUs without peer access, and with
ON_PCIE = ("T4", "P100", "L4", "A10")
ASHA = 0.5  # of the steps without early stopping: 37% and 48% were measured (docs/measured-ray-tune.md)
# Rows of the training split (0: unknown, train_rows says it), and about how many tokens a row has on average.
DATASETS = {
    "ash001/arxiv-abstract": (0, 220),
    "stanfordnlp/imdb": (25000, 300),
    "databricks/databricks-dolly-15k": (15011, 200),
}
PADDED = 1.3  # tokens computed for one of text, in micro-batches of several padded rows


@dataclass(frozen=True)
class Machine:
    """What a plan asks of a machine; on a CPU there are no GPUs."""

    gpus: int  # that processes have, or shares of them
    name: str = ""
    gpu_bytes: float = 0  # of each
    peak_flops: float = 0  # of each, in 16 bits
    host_bytes: float = 0

    @classmethod
    def here(cls, cfg: BaseConfig, project: str) -> Machine:
        found, host = notebook.gpus(), psutil.virtual_memory().total
        if not found:
            return cls(0, host_bytes=host)
        shares = int(os.environ.get("GPU_SHARES") or 1)
        usual = shares if project == "deepspeed-offload" else len(found) * shares
        memory = float(found[0]["memory"].split()[0]) * 2**20 / shares
        limit = cfg.runtime.gpu_memory_limit_gib * GIB
        number = int(os.environ.get("NPROC_PER_NODE") or usual)
        return cls.of(found[0]["name"], number, min(memory, limit or memory), host, shares)

    @classmethod
    def of(cls, name: str, number: int, gpu_bytes: float, host_bytes: float, shares: int = 1) -> Machine:
        """`number` GPUs, or shares of them, of a name as the driver writes it."""
        words = name.replace("-", " ").split()
        peak = next((PEAK_TFLOPS[word][0] for word in words if word in PEAK_TFLOPS), 0)
        return cls(number, name, gpu_bytes, peak * 1e12 / shares, host_bytes)


def check(project: str, cfg: BaseConfig) -> None:
    """Print the plan. Raises `UserError` if the run cannot work on this machine."""
    machine = Machine.here(cfg, project)
    runtime.check_device(cfg, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    check_can_push(cfg)
    check_dataset(cfg)
    place = models.located(cfg.model).name
    model = models.empty_model(cfg.model)  # refuses what is gated, cannot be reached, or is not a model
    is_attached = is_hub_id(cfg.model.name) and Path(place).is_dir()
    print(f"{'model':15} {cfg.model.name}" + (f", attached: {place}" if is_attached else ""))
    check_memory(project, cfg, model, machine)
    check_disk(project, cfg, model, published=None if Path(place).is_dir() else place)
    seconds = estimate(project, cfg, model, machine)
    if machine.gpus == 1 and PROJECTS[project].sharded:
        print(f"{'one GPU':15} nothing is shared, which this project is about; {CHOOSE_TWO}")
    elif machine.gpus == 1 and project != "deepspeed-offload":
        print(f"{'one GPU':15} the same batches and losses as on two, in nearly twice the time; {CHOOSE_TWO}")
    if seconds:
        print(f"{'time':15} {rough(seconds)}: an estimate, by arithmetic; after 20 steps the progress bar knows better")


def check_dataset(cfg: BaseConfig) -> None:
    """Raise `UserError` if the dataset is the Hub's, and neither the Hub can be reached nor is it in the cache."""
    name = cfg.data.name
    if not is_hub_id(name):
        return
    try:
        huggingface_hub.HfApi(token=token()).dataset_info(name)
    except Exception as error:
        if not _cache("datasets", name).is_dir():
            raise explain_hub_error(error, "dataset", name) from error


def check_memory(project: str, cfg: BaseConfig, model: PreTrainedModel, machine: Machine) -> None:
    """Print what the run takes of the GPU's and the host's memory at least; raise `UserError` if they have less."""
    needs, parameters = PROJECTS[project], sum(p.numel() for p in model.parameters())
    if machine.gpus:
        states = needs.gpu * parameters / (machine.gpus if needs.sharded else 1)
        if states > machine.gpu_bytes:
            less = CHOOSE_TWO if needs.sharded and machine.gpus == 1 else "choose a smaller model"
            raise UserError(
                f"GPU memory: weights, gradients and AdamW's moments of {parameters / 1e6:,.0f} million parameters "
                f"take {states / GIB:.1f} GiB of each GPU ({machine.gpus} × {machine.name}), which has "
                f"{machine.gpu_bytes / GIB:.1f}: {less}"
            )
        print(f"{'GPU memory':15} {states / GIB:.1f} of {machine.gpu_bytes / GIB:.1f} GiB, and the activations")
    host = needs.host * parameters + max(machine.gpus, 1) * PROCESS
    if machine.gpus and host > machine.host_bytes:
        raise UserError(
            f"host memory: this run takes about {host / GIB:.1f} GiB, and the machine has "
            f"{machine.host_bytes / GIB:.1f}: choose a smaller model, or a larger machine"
        )
    print(f"{'host memory':15} about {host / GIB:.1f} of {machine.host_bytes / GIB:.1f} GiB")


def check_disk(project: str, cfg: BaseConfig, model: PreTrainedModel, published: str | None) -> None:
    """Print what the run takes of the disk; raise `UserError` if less is free.

    A checkpoint has 12 bytes a parameter, and the one before it goes after it is whole; `model/` has 4. The weights
    that are `published` on the Hub, of up to 4, come on top. What is there already counts.
    """
    parameters, folder = sum(p.numel() for p in model.parameters()), Path(cfg.output_dir)
    checkpoints = 2 if cfg.checkpoint.every else 1
    if project == "ray-tune":  # the best trial's, and others
        checkpoints *= 2
    needed = parameters * (12 * checkpoints + 4) - notebook.size(folder)
    if published:
        needed += max(0, 4 * parameters - notebook.size(_cache("models", published) / "blobs"))
    if not (REPOSITORY / ".venv-foundry/ready").exists():
        needed += PROJECTS[project].disk
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    if needed > free:
        less = ", or set checkpoint.every=0" if cfg.checkpoint.every else ""
        raise UserError(
            f"output_dir={folder}: this run takes up to {needed / GB:.1f} GB, and {free / GB:.1f} GB are free: make "
            f"room, or choose another disk{less}"
        )
    print(f"{'disk':15} up to {max(needed, 0) / GB:.1f} of {free / GB:.1f} GB")


def _cache(kind: str, name: str) -> Path:
    """The folder in which the Hub's client caches a model or dataset."""
    return Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}"


def estimate(project: str, cfg: BaseConfig, model: PreTrainedModel, machine: Machine) -> float | None:
    """Seconds of the whole run, by arithmetic: compute, what travels between the GPUs, AdamW on the host.

    None if it is not known how much there is to compute (the dataset's size), or how fast (a CPU, an unknown GPU).
    """
    needs, train, data = PROJECTS[project], cfg.train, cfg.data
    rows, average = DATASETS.get(data.name, (0, data.max_length))
    rows = min(data.train_rows or rows, rows or data.train_rows)
    if not machine.peak_flops or not (rows or train.max_steps):
        return None
    parameters = sum(p.numel() for p in model.parameters())
    padded = PADDED if train.micro_batch_size > 1 else 1
    packed = data.packing != "none"
    length = data.max_length if packed else min(data.max_length, average * padded)
    sequences = rows * average / data.max_length if packed else rows
    steps = train.max_steps or sequences * train.epochs / train.global_batch_size

    gpus = 1 if project == "ray-tune" else machine.gpus  # a trial has one
    flops = flops_per_token(model, data.max_length)
    per_second = gpus * machine.peak_flops * SERVED
    compute = train.global_batch_size * length * flops * (4 / 3 if train.activation_checkpointing else 1) / per_second
    micro_batches = max(1, train.global_batch_size / train.micro_batch_size / gpus)
    moved = parameters * (needs.step + needs.micro_batch * micro_batches) * (gpus - 1) / gpus
    if project == "deepspeed-offload":  # to the host and back, with one GPU too
        moved = parameters * needs.step
    on_pcie = any(word in machine.name.replace("-", " ").split() for word in ON_PCIE)
    step = compute + moved / (PCIE if on_pcie else NVLINK) + parameters * needs.on_host / HOST_BANDWIDTH
    evaluations = 2 + (steps // cfg.eval.every if cfg.eval.every else 0)
    evaluation = data.eval_rows * min(average, data.max_length) * flops / 3 / per_second
    seconds = steps * step + evaluations * evaluation
    if project == "ray-tune":
        seconds *= get(cfg, "search.trials") / machine.gpus * (ASHA if get(cfg, "search.scheduler") == "asha" else 1)
    return seconds


def rough(seconds: float) -> str:
    """`about 40 minutes`: a duration as an estimate is worth saying."""
    minutes = seconds / 60
    if minutes < 100:
        return f"about {max(5, round(minutes / 5) * 5)} minutes"
    return f"about {minutes / 60:.0f} hours"


def main() -> None:
    """Check the project that the command line names, with its settings."""
    if len(sys.argv) < 2 or sys.argv[1] not in PROJECTS:
        raise UserError(f"name a project first: {', '.join(PROJECTS)}")
    project = sys.argv.pop(1)
    sys.path.insert(0, str(REPOSITORY / project))
    from settings import Config

    check(project, parse_config(Config, str(REPOSITORY / project / "train.py")))


if __name__ == "__main__":
    errors.run(main)
