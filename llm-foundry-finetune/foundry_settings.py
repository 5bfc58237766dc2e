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

# Where Foundry has what config.yaml owns, and what follows from that. Another value there would leave the other file's
# without effect, and the run folder's config.yaml untrue.
OWNED = {
    "max_seq_len": "${variables.data.max_length}",
    "model.pretrained_model_name_or_path": "${variables.run.model}",
    "model.pretrained": "${variables.run.pretrained}",
    "tokenizer.name": "${variables.run.tokenizer}",
    "tokenizer.kwargs.model_max_length": "${variables.data.max_length}",
    "train_loader.dataset.hf_kwargs.data_files": "${variables.run.train_file}",
    "train_loader.dataset.max_seq_len": "${variables.data.max_length}",
    "train_loader.dataset.packing_ratio": "${variables.run.packing_ratio}",
    "train_loader.dataset.target_responses": "${variables.run.target_responses}",
    "eval_loader.dataset.hf_kwargs.data_files": "${variables.run.eval_file}",
    "eval_loader.dataset.max_seq_len": "${variables.data.max_length}",
    "global_train_batch_size": "${variables.train.global_batch_size}",
    "device_train_microbatch_size": "${variables.train.micro_batch_size}",
    "device_eval_batch_size": "${variables.eval.batch_size}",
    "optimizer.lr": "${variables.train.learning_rate}",
    "optimizer.weight_decay": "${variables.run.decoupled_weight_decay}",
    "scheduler": "${variables.schedules.${variables.train.lr_schedule}}",
    "max_duration": "${variables.run.total_steps}ba",
    "eval_interval": "${variables.run.eval_interval}",
    "seed": "${variables.seed}",
    "precision": "${variables.precisions.${variables.run.dtype}}",
    "dist_timeout": "${variables.run.timeout_seconds}",
    "fsdp_config.activation_checkpointing": "${variables.train.activation_checkpointing}",
    "load_path": "${variables.run.checkpoint}",
    "callbacks.gradient_norm.max_norm": "${variables.train.max_grad_norm}",
}
# Without the last, attention would cross packed documents.
NEEDED = ("callbacks.gradient_norm", "callbacks.run_folder", "callbacks.document_attention")


def read_settings(cfg: Config) -> DictConfig:
    """The file of `foundry.file`, a path or a name next to train.py, not yet resolved.

    Raises `UserError` for a missing or broken file, a key that LLM Foundry does not know, and a missing callback.
    """
    # Next to train.py first: the default must not be another program's file of that name in the current folder.
    ours = Path(__file__).resolve().parent / cfg.foundry.file
    path = next((p for p in (ours, Path(cfg.foundry.file)) if p.is_file()), None)
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
        try:
            found = OmegaConf.select(settings, name)
        except OmegaConfBaseException:  # there is no section to look in
            found = None
        if found is None:
            raise UserError(f"{path}: {name} is missing: copy it from this project's foundry.yaml")
    return settings


def write_settings(cfg: Config, settings: DictConfig, values: dict[str, Any], target: Path) -> Path:
    """Put the common settings and `values` into `settings`, check that all is filled in, and write them to `target`.

    Raises `UserError` for `${variables…}` that do not exist and for a number instead of config.yaml's.
    """
    common = OmegaConf.to_container(OmegaConf.structured(cfg))
    try:
        settings = OmegaConf.merge(settings, {"variables": common | {"run": values}})
        resolved = OmegaConf.to_container(OmegaConf.merge(settings, {"owned": OWNED}), resolve=True)
    except (OmegaConfBaseException, TypeError) as error:  # the latter, if `variables` holds no keys
        problem, name = str(error).splitlines()[0], getattr(error, "full_key", None) or "variables"
        raise UserError(f"foundry.file={cfg.foundry.file}: {name.removeprefix('owned.')}: {problem}") from None
    for name, ours in resolved["owned"].items():
        theirs = resolved
        for part in name.split("."):
            theirs = theirs.get(part) if isinstance(theirs, dict) else None
        if theirs != ours:
            raise UserError(
                f"foundry.file={cfg.foundry.file}: {name} is {theirs}, but config.yaml owns it ({ours}): write "
                f"{OWNED[name]} there, and set the value in config.yaml or on the command line"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(settings, target)
    return target
