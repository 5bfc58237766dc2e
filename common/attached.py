"""A Hub model that Kaggle has attached to the notebook, found by its name: it needs neither internet nor a token.

Kaggle mounts a model as MODEL/FRAMEWORK/VARIATION/VERSION, today below models/USER/, and a dataset as SLUG or
datasets/USER/SLUG. Names are written as in `llama-3.2/transformers/1b-instruct/1` or `qwen2/transformers/qwen2-7b/1`.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

INPUT = Path("/kaggle/input")
LEVELS = 7  # models/USER/MODEL/FRAMEWORK/VARIATION/VERSION/FOLDER
NO_NAMES = {"transformers", "pytorch", "default"}  # parts of a path that name no model; nor do versions


@functools.cache
def attached_model(name: str) -> Path | None:
    """The folder of the model that is `name` on the Hub; of several versions the last; None if none is attached."""
    wanted = _slug(name.rpartition("/")[2])
    for level in range(1, LEVELS + 1):
        for config in sorted(INPUT.glob("*/" * level + "config.json"), reverse=True):
            parts = config.parent.relative_to(INPUT).parts
            words = [part for part in parts if part not in NO_NAMES and not part.isdecimal()]
            if wanted in (_slug("-".join(words[-1:])), _slug("-".join(words[-2:]))):
                return config.parent
    return None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())
