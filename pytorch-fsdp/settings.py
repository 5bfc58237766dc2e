"""The settings of this project: the keys of all projects, and a section of its own."""

from dataclasses import dataclass, field

from common.config import BaseConfig, key

PROJECT = "pytorch-fsdp"


@dataclass
class FSDPConfig:
    reshard_after_forward: bool = key(True, "drop a layer's gathered weights until its backward gathers them again")
    no_sync: bool = key(
        False, "reduce gradients once per step, not after every micro-batch: 4 bytes per parameter more"
    )
    prefetch: int = key(1, "layers whose weights are gathered ahead, while another computes", minimum=0)
    cpu_offload: bool = key(False, "keep weights, gradients and Adam's moments in host memory, and step there")


@dataclass
class Config(BaseConfig):
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
