"""The settings of this project: the keys of all projects, and a section of its own."""

from dataclasses import dataclass, field

from common.config import BaseConfig, key

PROJECT = "ray-train"


@dataclass
class RayConfig:
    workers: int = key(0, "workers, one per GPU; 0: as many as the cluster has GPUs, or two on the CPU", minimum=0)
    max_failures: int = key(3, "times that Ray starts the workers again after one has died", minimum=0)
    ds_config: str = key("ds_config.json", "DeepSpeed's own settings: a path, or a name next to train.py")


@dataclass
class Config(BaseConfig):
    ray: RayConfig = field(default_factory=RayConfig)
