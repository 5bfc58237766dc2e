"""ds_config.json of this project: what it may hold, and what ZeRO-2 with CPU offload needs in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from common import ds_settings
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
    "fp16": ds_settings.FP16,
    "communication_data_type": str,
    "wall_clock_breakdown": bool,
}
OWNED_BY_YAML = ds_settings.OWNED_BY_YAML | {
    "optimizer": "train.learning_rate, train.weight_decay and offload.optimizer",
    "zero_force_ds_cpu_optimizer": "offload.optimizer",
}


def read_ds_config(name: str, folder: Path) -> dict[str, Any]:
    """The settings in the JSON file `name`: a path, or a file in `folder`.

    Raises `UserError` for a missing or broken file, a key that the YAML owns or that is not known, a wrong type, a
    stage other than 2, and an offload to anything but host memory.
    """
    why = ", which is what this project shows and what its checkpoints hold"
    path, settings = ds_settings.read_ds_config("offload.ds_config", name, folder, KNOWN, OWNED_BY_YAML, 2, why)
    device = settings["zero_optimization"].get("offload_optimizer", {}).get("device")
    if device != "cpu":
        raise UserError(f"{path}: zero_optimization.offload_optimizer.device is {device or 'not set'}: set it to cpu")
    return settings


def engine_settings(
    ds_config: dict[str, Any], cfg: BaseConfig, dtype: torch.dtype, accumulation: int
) -> dict[str, Any]:
    """What `deepspeed.initialize` takes: the JSON, completed from the YAML."""
    settings = ds_settings.engine_settings(ds_config, cfg, dtype, accumulation, get_accelerator().is_fp16_supported())
    return settings | {"zero_force_ds_cpu_optimizer": False}  # offload.optimizer=torch is allowed too
