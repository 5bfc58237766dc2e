"""ds_config.json: read and checked before anything is downloaded, then completed from the YAML.

The JSON holds what is DeepSpeed's own (stage, offload, buckets, loss scaler). What all projects set in the YAML is an
error in the JSON: two places for one setting would sooner or later differ.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from common.config import BaseConfig
from common.errors import UserError

# What the JSON may hold. DeepSpeed knows more keys; those have no place in ZeRO-2 with offload.
KNOWN: dict[str, Any] = {
    "zero_optimization": {
        "stage": int,
        "offload_optimizer": {"device": str, "pin_memory": bool},
        "reduce_bucket_size": int,
        "allgather_bucket_size": int,
        "overlap_comm": bool,
        "reduce_scatter": bool,
        "contiguous_gradients": bool,
        "use_multi_rank_bucket_allreduce": bool,
    },
    "fp16": {
        "initial_scale_power": int,
        "loss_scale_window": int,
        "hysteresis": int,
        "consecutive_hysteresis": bool,
        "min_loss_scale": int,
    },
    "communication_data_type": str,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
}
# DeepSpeed's key, and the keys of the YAML that stand for it.
OWNED_BY_YAML = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size, from which it follows",
    "gradient_clipping": "train.max_grad_norm",
    "fp16.enabled": "train.precision",
    "fp16.auto_cast": "train.precision",
    "fp16.loss_scale": "train.precision (the loss scaler is dynamic)",
    "fp16.fp16_master_weights_and_grads": "train.precision (masters are fp32)",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "amp": "train.precision",
    "optimizer": "train.learning_rate, train.weight_decay and offload.optimizer",
    "zero_force_ds_cpu_optimizer": "offload.optimizer",
    "scheduler": "train.lr_schedule and train.warmup_steps",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
    "steps_per_print": "nothing: metrics.jsonl has a line for every step",
    "tensorboard": "tracking.backend",
    "wandb": "tracking.backend",
    "csv_monitor": "tracking.backend",
    "comet": "tracking.backend",
    "checkpoint": "checkpoint.every and checkpoint.keep",
    "seed": "seed",
}


def read_ds_config(name: str, folder: Path) -> dict[str, Any]:
    """The settings in the JSON file `name`: a path, or a file in `folder`.

    Raises `UserError` for a missing or broken file, a key that the YAML owns or that is not known, a wrong type, a
    stage other than 2, and an offload to anything but host memory.
    """
    path = next((p for p in (Path(name).expanduser(), folder / name) if p.is_file()), None)
    if path is None:
        raise UserError(f"offload.ds_config={name}: no such file, neither as a path nor in {folder.name}/")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must hold one object, {{…}}")
    _check(settings, KNOWN, path)
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") != 2:
        raise UserError(
            f"{path}: zero_optimization.stage is {zero.get('stage', 'not set')}: set it to 2, which is what this "
            f"project shows and what its checkpoints hold"
        )
    device = zero.get("offload_optimizer", {}).get("device")
    if device != "cpu":
        raise UserError(f"{path}: zero_optimization.offload_optimizer.device is {device or 'not set'}: set it to cpu")
    return settings


def _check(settings: dict[str, Any], known: dict[str, Any], path: Path, section: str = "") -> None:
    for name, value in settings.items():
        key = f"{section}{name}"
        if key in OWNED_BY_YAML:
            raise UserError(f"{path}: {key} does not belong here; the YAML has {OWNED_BY_YAML[key]}")
        if name not in known:
            owned = [k.removeprefix(section) for k in OWNED_BY_YAML if k.startswith(section)]
            near = difflib.get_close_matches(name, [*known, *owned], n=1)
            hint = f"did you mean {section}{near[0]}?" if near else f"there are: {', '.join(known)}"
            raise UserError(f"{path}: {key} is no key of DeepSpeed's that ZeRO-2 with offload uses; {hint}")
        wanted = known[name]
        if isinstance(wanted, dict):
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key} is {json.dumps(value)}: it must be an object, {{…}}")
            _check(value, wanted, path, f"{key}.")
        elif wanted is int and isinstance(value, float) and value.is_integer() and value >= 0:
            settings[name] = int(value)  # DeepSpeed's own documents write 5e8
        elif type(value) is not wanted or (wanted is int and value < 0):
            form = {int: "a whole number", bool: "true or false", str: "a text"}[wanted]
            raise UserError(f"{path}: {key} is {json.dumps(value)}: it must be {form}")


def engine_settings(
    ds_config: dict[str, Any], cfg: BaseConfig, dtype: torch.dtype, accumulation: int
) -> dict[str, Any]:
    """What `deepspeed.initialize` takes: the JSON, and what the YAML says.

    Raises `UserError` for a precision that DeepSpeed does not offer on this device (fp16 on most CPUs).
    """
    if dtype == torch.float16 and not get_accelerator().is_fp16_supported():
        raise UserError("train.precision=fp16: DeepSpeed has no fp16 on this CPU; set train.precision=fp32 or bf16")
    return ds_config | {
        "train_batch_size": cfg.train.global_batch_size,
        "train_micro_batch_size_per_gpu": cfg.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": cfg.train.max_grad_norm,  # 0: none
        "fp16": ds_config.get("fp16", {}) | {"enabled": dtype == torch.float16},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_force_ds_cpu_optimizer": False,  # offload.optimizer=torch is allowed too
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU in every step
    }
