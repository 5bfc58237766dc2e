"""The settings of this project: the keys of all projects, and a section of its own."""

from dataclasses import dataclass, field

from common.config import BaseConfig, key

PROJECT = "pytorch-ddp"


@dataclass
class DDPConfig:
    bucket_mb: int = key(25, "gradients are all-reduced in buckets of this many MB", minimum=1)
    gradient_compression: str = key("none", "type that gradients travel in", choices=("none", "fp16", "bf16"))


@dataclass
class Config(BaseConfig):
    ddp: DDPConfig = field(default_factory=DDPConfig)
