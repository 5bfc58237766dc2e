"""DeepSpeed's JSON: read and checked before anything is downloaded, then completed from the YAML.

The JSON holds what is DeepSpeed's own (stage, buckets, loss scaler). What all projects set in the YAML is an error in
the JSON: two places for one setting would sooner or later differ. Each project lists the keys that it knows.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import BaseConfig
from common.errors import UserError

if TYPE_CHECKING:
    import torch
    from deepspeed.runtime.fp16.loss_scaler import LossScalerBase

# The loss scaler's keys, as a project's `known` has them.
FP16 = {
    "initial_scale_power": int,
    "loss_scale_window": int,
    "hysteresis": int,
    "consecutive_hysteresis": bool,
    "min_loss_scale": int,
}
# Keys for which 0 ends in a traceback, some steps later even; of hysteresis, in a loss scale that never falls.
NOT_ZERO = ("zero_optimization.reduce_bucket_size", "fp16.loss_scale_window", "fp16.hysteresis")
CHOICES = {"communication_data_type": ("fp16", "bf16", "fp32")}
# DeepSpeed's key, and the keys of the YAML that stand for it.
OWNED_BY_YAML = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size, from which it follows",
    "gradient_clipping": "train.max_grad_norm",
    **dict.fromkeys(("fp16.enabled", "fp16.auto_cast", "bf16", "bfloat16", "torch_autocast"), "train.precision"),
    **dict.fromkeys(("data_types", "amp"), "train.precision"),
    "fp16.loss_scale": "train.precision (the loss scaler is dynamic)",
    "fp16.fp16_master_weights_and_grads": "train.precision (masters are fp32)",
    "optimizer": "train.learning_rate and train.weight_decay",
    "scheduler": "train.lr_schedule and train.warmup_steps",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
    "steps_per_print": "nothing: metrics.jsonl has a line for every step",
    "memory_breakdown": "nothing: metrics.jsonl has the peak of GPU memory, which this would reset all the time",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "tracking.backend"),
    "checkpoint": "checkpoint.every and checkpoint.keep",
    "seed": "seed",
}


@contextlib.contextmanager
def without_mlflow() -> Iterator[None]:
    """For `import deepspeed`: its autotuner, unused here, would import MLflow if it is installed, which takes a second.

    A module that is None in `sys.modules` counts as missing.
    """
    loaded = sys.modules.get("mlflow")
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]
        if loaded:
            sys.modules["mlflow"] = loaded


def read_ds_config(
    key: str, name: str, folder: Path, known: dict[str, Any], owned: dict[str, str], stage: int, why: str
) -> tuple[Path, dict[str, Any]]:
    """The JSON file `name`, a path or a file in `folder`, and the settings in it; `key` is the YAML's for it.

    `known` has the keys that it may hold, with their types; `owned` those that the YAML owns, as `OWNED_BY_YAML`;
    `stage` is ZeRO's that it must have, and `why` the rest of that error's sentence. Raises `UserError` for a
    missing or broken file, a key that the YAML owns or that is not known, a wrong type or value, another stage.
    """
    # The folder first: the default must not be another program's file of that name in the current folder.
    path = next((p for p in (folder / name, Path(name).expanduser()) if p.is_file()), None)
    if path is None:
        raise UserError(f"{key}={name}: no such file, neither as a path nor in {folder.name}/")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must hold one object, {{…}}")
    _check(settings, known, owned, path)
    found = settings.get("zero_optimization", {}).get("stage", "not set")
    if found != stage:
        raise UserError(f"{path}: zero_optimization.stage is {found}: set it to {stage}{why}")
    return path, settings


def _check(settings: dict[str, Any], known: dict[str, Any], owned: dict[str, str], path: Path, section: str = ""):
    for name, value in settings.items():
        key = f"{section}{name}"
        if key in owned:
            raise UserError(f"{path}: {key} does not belong here; the YAML has {owned[key]}")
        if name not in known:
            here = [k.removeprefix(section) for k in owned if k.startswith(section)]
            near = difflib.get_close_matches(name, [*known, *here], n=1)
            hint = f"did you mean {section}{near[0]}?" if near else f"there are: {', '.join(known)}"
            raise UserError(f"{path}: {key} is not a DeepSpeed key that this project uses; {hint}")
        wanted = known[name]
        if isinstance(wanted, dict):
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key} is {json.dumps(value)}: it must be an object, {{…}}")
            _check(value, wanted, owned, path, f"{key}.")
        elif wanted is int and isinstance(value, float) and value.is_integer() and value >= 0:
            settings[name] = int(value)  # DeepSpeed's own documents write 5e8
        elif type(value) is not wanted or (wanted is int and value < 0):
            form = {int: "a whole number", bool: "true or false", str: "a text"}[wanted]
            raise UserError(f"{path}: {key} is {json.dumps(value)}: it must be {form}")
        elif value == 0 and key in NOT_ZERO:
            raise UserError(f"{path}: {key} is 0: it must be 1 or more")
        elif key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{path}: {key} is {json.dumps(value)}: it must be one of {', '.join(CHOICES[key])}")


def engine_settings(
    ds_config: dict[str, Any], cfg: BaseConfig, dtype: torch.dtype, accumulation: int, has_fp16: bool
) -> dict[str, Any]:
    """What `deepspeed.initialize` takes: the JSON, completed from the YAML.

    Raises `UserError` for a precision that DeepSpeed does not offer on this device: with `has_fp16` False, fp16.
    """
    import torch  # here: train.py takes `without_mlflow` from this module before it imports torch

    if dtype == torch.float16 and not has_fp16:
        raise UserError("train.precision=fp16: DeepSpeed has no fp16 on this CPU; set train.precision=fp32 or bf16")
    return ds_config | {
        "train_batch_size": cfg.train.global_batch_size,
        "train_micro_batch_size_per_gpu": cfg.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": cfg.train.max_grad_norm,  # 0: none
        "fp16": ds_config.get("fp16", {}) | {"enabled": dtype == torch.float16},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU in every step
    }


def scaler_state(scaler: LossScalerBase) -> dict[str, Any]:
    """What the loss scaler has learnt so far; empty unless the run is in fp16."""
    learnt = {name: value for name, value in vars(scaler).items() if name.startswith(("cur_", "last_"))}
    return learnt if scaler.dynamic else {}


def restore_scaler(scaler: LossScalerBase, state: dict[str, Any]) -> None:
    """Put back what `scaler_state` gave; a run that was not in fp16 so far begins with a new run's scale."""
    # NOTE: earlier checkpoints of other precisions hold their scale, 1, with which gradients underflow fp16, unnoticed.
    if scaler.dynamic and "cur_iter" in state:
        vars(scaler).update(state)
