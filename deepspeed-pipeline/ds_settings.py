"""ds_config.json of this project: what it may hold, and what a pipeline with ZeRO-1 needs in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import ds_settings

# What the JSON may hold. DeepSpeed knows more keys; those have no place in a pipeline with ZeRO-1.
KNOWN: dict[str, Any] = {
    "zero_optimization": {
        "stage": int,
        "reduce_bucket_size": int,
        "allgather_bucket_size": int,
        "contiguous_gradients": bool,
    },
    "fp16": ds_settings.FP16,
    "communication_data_type": str,
}
OWNED_BY_YAML = ds_settings.OWNED_BY_YAML | {
    "pipeline": "pipeline.stages and pipeline.partition, and train.activation_checkpointing",
    "wall_clock_breakdown": "nothing: with it DeepSpeed's pipeline fails if steps_per_print is not set",
}


def read_ds_config(name: str, folder: Path) -> dict[str, Any]:
    """The settings in the JSON file `name`: a path, or a file in `folder`.

    Raises `UserError` for a missing or broken file, a key that the YAML owns or that is not known, a wrong type, and a
    stage of ZeRO other than 1.
    """
    why = "; a pipeline adds up a step's gradients whole, so ZeRO may only shard the optimizer's state"
    return ds_settings.read_ds_config("pipeline.ds_config", name, folder, KNOWN, OWNED_BY_YAML, 1, why)[1]
