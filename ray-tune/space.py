"""The search space: `search.space` of the YAML as Ray Tune's distributions; what a search contradicts itself in."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ray import tune
from ray.tune.search.sample import Domain

from common.config import BaseConfig, TrainConfig
from common.errors import UserError

SEARCHABLE = ("learning_rate", "lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm", "micro_batch_size")
KINDS = {"choice": tune.choice, "uniform": tune.uniform, "log_uniform": tune.loguniform}


def param_space(cfg: BaseConfig) -> dict[str, Domain]:
    """Key of `train.` → distribution. Raises `UserError` for a space that is empty, contradictory or not comparable."""
    if not cfg.search.space:
        raise UserError(
            "search.space is empty: name what to search, for example learning_rate: {log_uniform: [5.0e-6, 5.0e-5]}"
        )
    return {name: _domain(cfg, name, spec) for name, spec in cfg.search.space.items()}


def default_parameters(cfg: BaseConfig) -> dict[str, Any]:
    """What the configuration itself has for the keys that are searched: the first trial."""
    return {name: getattr(cfg.train, name) for name in cfg.search.space}


def with_parameters(cfg: BaseConfig, parameters: dict[str, Any]) -> TrainConfig:
    """`cfg.train` with the values that a trial was given, in the types of the keys (samplers give NumPy's)."""
    typed = {name: type(getattr(cfg.train, name))(value) for name, value in parameters.items()}
    return dataclasses.replace(cfg.train, **typed)


def check_search(cfg: BaseConfig, total_steps: int) -> None:
    """Raise `UserError` for a search that contradicts itself; `total_steps` of 0: not known before the data is."""
    s = cfg.search
    if cfg.checkpoint.resume not in ("auto", "never"):
        raise UserError(f"checkpoint.resume={cfg.checkpoint.resume}: a search resumes in its output_dir: auto or never")
    if s.scheduler == "asha" and not 0 < cfg.eval.every <= s.grace_period:
        raise UserError(
            f"eval.every={cfg.eval.every}: ASHA compares held-out losses from step search.grace_period="
            f"{s.grace_period} on: set eval.every between 1 and that"
        )
    if s.scheduler == "asha" and total_steps and s.grace_period >= total_steps:
        raise UserError(
            f"search.grace_period={s.grace_period} is not below a trial's budget of {total_steps} optimizer steps: no "
            f"trial could be stopped early; lower it, or set search.scheduler=none"
        )
    longest = max([cfg.train.warmup_steps, *next(iter(s.space.get("warmup_steps", {0: []}).values()))], default=0)
    if total_steps and longest >= total_steps:
        raise UserError(f"{longest} warm-up steps are not below a trial's budget of {total_steps}: lower them")


def _domain(cfg: BaseConfig, name: str, spec: Any) -> Domain:
    where = f"search.space.{name}"
    if name in ("epochs", "max_steps", "global_batch_size"):
        raise UserError(f"{where}: trials of unequal length or batch cannot be compared at one step: set train.{name}")
    if name not in SEARCHABLE:
        raise UserError(f"{where}: cannot be searched; what can be: {', '.join(SEARCHABLE)}")
    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in KINDS:
        raise UserError(f"{where}={spec}: write one of " + ", ".join(f"{{{kind}: […]}}" for kind in KINDS))
    kind, values = next(iter(spec.items()))
    if not isinstance(values, list) or not values or (kind != "choice" and len(values) != 2):
        raise UserError(f"{where}.{kind}={values}: " + ("list the values" if kind == "choice" else "write [low, high]"))
    values = [_typed(cfg, name, value, where) for value in values]
    default = getattr(cfg.train, name)
    if kind == "choice":
        inside = default in values
    else:
        low, high = values
        if not isinstance(default, float):
            raise UserError(f"{where}.{kind}: train.{name} takes no fractions: write {{choice: {values}}}")
        if low >= high or (kind == "log_uniform" and low <= 0):
            least = "above 0 and " if kind == "log_uniform" else ""
            raise UserError(f"{where}.{kind}={values}: the first number must be {least}below the second")
        inside = low <= default <= high
    if not inside:
        raise UserError(
            f"{where}.{kind}={values} does not hold train.{name}={default}, with which the first trial runs: "
            f"widen it, or set train.{name}"
        )
    return KINDS[kind](values) if kind == "choice" else KINDS[kind](*values)


def _typed(cfg: BaseConfig, name: str, value: Any, where: str) -> Any:
    """`value` in the type of `train.<name>`, within what that key takes."""
    field = next(f for f in dataclasses.fields(TrainConfig) if f.name == name)
    kind = type(field.default)
    try:
        typed = kind(value)  # also of a text: YAML takes 5e-6, without a point, for one
    except (TypeError, ValueError):
        raise UserError(f"{where}: {value!r} is not a {kind.__name__}") from None
    if isinstance(value, bool) or (kind is int and typed != value) or (kind is str and not isinstance(value, str)):
        raise UserError(f"{where}: {value!r} is not a {kind.__name__}")
    choices, minimum = field.metadata["choices"], field.metadata["minimum"]
    if kind is float and not math.isfinite(typed):
        raise UserError(f"{where}: {value} is not a number that can be drawn")
    if choices and typed not in choices:
        raise UserError(f"{where}: {value} is not one of {', '.join(choices)}")
    if minimum is not None and typed < minimum:
        raise UserError(f"{where}: {value} is too small: the least is {minimum:g}")
    if name == "micro_batch_size" and cfg.train.global_batch_size % typed:
        raise UserError(f"{where}: {value} does not divide train.global_batch_size={cfg.train.global_batch_size}")
    return typed
