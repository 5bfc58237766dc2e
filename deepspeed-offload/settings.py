"""The settings of this project: the keys of all projects, and a section of its own."""

from dataclasses import dataclass, field

from common.config import BaseConfig, key

PROJECT = "deepspeed-offload"


@dataclass
class OffloadConfig:
    ds_config: str = key("ds_config.json", "DeepSpeed's own settings: a path, or a name next to train.py")
    optimizer: str = key(
        "cpu_adam", "AdamW on the CPU: DeepSpeed's, compiled on first use, or torch's", choices=("cpu_adam", "torch")
    )
    page_lock: bool = key(True, "lock the host buffers that the GPU reads and writes: faster copies, no memory more")
    group_millions: float = key(64, "parameters, in millions, that AdamW updates at a time", minimum=0.001)


@dataclass
class Config(BaseConfig):
    offload: OffloadConfig = field(default_factory=OffloadConfig)
