"""ds_config.json of this project: what it may hold, and what ZeRO-3 needs in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from common import ds_settings
from common.config import BaseConfig
from common.errors import UserError

# What the JSON may hold. DeepSpeed knows more keys; those have no place in ZeRO-3 without offload.
KNOWN: dict[str, Any] = {
    "zero_optimization": {
        "stage": int,
        "sub_group_size": int,
        "reduce_bucket_size": int,
        "stage3_prefetch_bucket_size": int,
        "stage3_param_persistence_threshold": int,
        "stage3_max_live_parameters": int,
        "stage3_max_reuse_distance": int,
        "overlap_comm": bool,
        "contiguous_gradients": bool,
        "round_robin_gradients": bool,
    },
    "fp16": ds_settings.FP16,
    "communication_data_type": str,
    "wall_clock_breakdown": bool,
}


def read_ds_config(name: str, folder: Path) -> dict[str, Any]:
    """The settings in the JSON file `name`: a path, or a file in `folder`.

    Raises `UserError` for a missing or broken file, a key that the YAML owns or that is not known, a wrong type, and a
    stage other than 3.
    """
    why = ", which is what this project shows and what its checkpoints hold"
    return ds_settings.read_ds_config("ray.ds_config", name, folder, KNOWN, ds_settings.OWNED_BY_YAML, 3, why)[1]


def engine_settings(
    ds_config: dict[str, Any], cfg: BaseConfig, dtype: torch.dtype, accumulation: int
) -> dict[str, Any]:
    """What `deepspeed.initialize` takes: the JSON, completed from the YAML. Raises `UserError` for `train.compile`."""
    if cfg.train.compile:  # measured: right on a CPU; on a GPU, fp16, the gradients' norm was 4.6 instead of 5.8
        raise UserError("train.compile=true: under ZeRO-3 compiled layers have wrong gradients: set it to false")
    settings = ds_settings.engine_settings(ds_config, cfg, dtype, accumulation, get_accelerator().is_fp16_supported())
    # DeepSpeed adds up the gradients of micro-batches in the model's type. bf16 has 8 bits for that: too few.
    return settings | ({"data_types": {"grad_accum_dtype": "fp32"}} if dtype == torch.bfloat16 else {})
