"""The settings of this project: the keys of all projects, and a section of its own."""

from dataclasses import dataclass, field

from common.config import BaseConfig, key

PROJECT = "deepspeed-pipeline"


@dataclass
class PipelineConfig:
    ds_config: str = key("ds_config.json", "DeepSpeed's own settings: a path, or a name next to train.py")
    stages: int = key(0, "stages that the layers are cut into, each on a process of its own; 0: one on each", minimum=0)
    partition: str = key("measured", "decoder layers of each stage, such as 10,6; measured: by the times of layer and "
                         "head on this device; computed: by their operations")  # fmt: skip


@dataclass
class Config(BaseConfig):
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
