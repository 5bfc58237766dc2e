"""foundry.yaml: completed with the common settings, checked, and written to where LLM Foundry reads it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from settings import Config

from common.errors import UserError

# Where Foundry has the settings that config.yaml owns. A number written there would leave the other file's without
# effect, and the run folder's config.yaml untrue.
OWNED = {
    "max_seq_len": "variables.data.max_length",
    "train_loader.dataset.max_seq_len": "variables.data.max_length",
    "global_train_batch_size": "variables.train.global_batch_size",
    "device_train_microbatch_size": "variables.train.micro_batch_size",
    "device_eval_batch_size": "variables.eval.batch_size",
    "optimizer.lr": "variables.train.learning_rate",
    "max_duration": "variables.run.total_steps",
    "seed": "variables.seed",
    "load_path": "variables.run.checkpoint",
}
NEEDED = ("callbacks.gradient_norm", "callbacks.run_folder")


def read_settings(cfg: Config) -> DictConfig:
    """The file of `foundry.file`, a path or a name beside train.py, not yet resolved.

    Raises `UserError` for a missing or broken file, a key that LLM Foundry does not know, and a missing callback.
    """
    beside = Path(__file__).resolve().parent / cfg.foundry.file
    path = next((p for p in (Path(cfg.foundry.file), beside) if p.is_file()), None)
    if path is None:
        raise UserError(f"foundry.file={cfg.foundry.file}: no such file")
    try:
        settings = OmegaConf.create(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise UserError(f"{path}{place}: cannot be read: {problem}") from None
    if not OmegaConf.is_dict(settings):
        raise UserError(f"{path}: must hold `key: value` lines")
    # Foundry works `global_train_batch_size` out itself, and so does not list it.
    known = TRAIN_CONFIG_KEYS | {"global_train_batch_size"}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise UserError(f"{path}: LLM Foundry has no key {name}" + (f": did you mean {near[0]}?" if near else ""))
    for name in NEEDED:
        if OmegaConf.select(settings, name) is None:
            raise UserError(f"{path}: {name} is missing: copy it from this project's foundry.yaml")
    return settings


def write_settings(cfg: Config, settings: DictConfig, values: dict[str, Any], target: Path) -> Path:
    """Put the common settings and `values` into `settings`, check that all is filled in, and write them to `target`.

    Raises `UserError` for `${variables…}` that do not exist and for a number where config.yaml's must stand.
    """
    common = OmegaConf.to_container(OmegaConf.structured(cfg))
    settings = OmegaConf.merge(settings, {"variables": common | {"run": values}})
    try:
        OmegaConf.to_container(settings, resolve=True)
    except OmegaConfBaseException as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"foundry.file={cfg.foundry.file}: {error.full_key or '?'}: {problem}") from None
    for name, owner in OWNED.items():
        ours, theirs = OmegaConf.select(settings, owner), OmegaConf.select(settings, name)
        if str(theirs).removesuffix("ba") != str(ours):
            raise UserError(
                f"foundry.file={cfg.foundry.file}: {name} is {theirs}, but config.yaml owns it ({ours}): write "
                f"${{{owner}}} there, and set the value in config.yaml or on the command line"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(settings, target)
    return target
