"""The settings of this project: the keys of all projects, and a section of its own."""

from dataclasses import dataclass, field
from typing import Any

from common.config import BaseConfig, key

PROJECT = "ray-tune"


@dataclass
class SearchConfig:
    space: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "train. key → {choice|uniform|log_uniform: […]}"}
    )
    trials: int = key(6, "trials, the first of which has the configuration's own values", minimum=1)
    algorithm: str = key("random", "who chooses the values", choices=("random", "optuna"))
    scheduler: str = key("asha", "asha: stop bad trials early; none: train all to the end", choices=("asha", "none"))
    grace_period: int = key(50, "optimizer steps before a trial can be stopped: the first rung", minimum=1)
    reduction_factor: int = key(3, "N: the best 1/N continue; rungs are N times as far apart each", minimum=2)
    gpus_per_trial: float = key(1.0, "share of a GPU that a trial takes: 0.5 runs two on each", minimum=0.05)
    concurrent_trials: int = key(0, "at most N at a time; 0: as many as the GPUs take, two on a CPU", minimum=0)


@dataclass
class Config(BaseConfig):
    search: SearchConfig = field(default_factory=SearchConfig)
