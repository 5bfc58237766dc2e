"""The settings of this project: the common keys, and a section for LLM Foundry's own.

Apart from `train.py`, so that `eval.py` and `prepare_data.py` need no LLM Foundry.
"""

from dataclasses import dataclass, field

from common.config import BaseConfig, key

PROJECT = "llm-foundry-finetune"


@dataclass
class FoundryConfig:
    file: str = key("foundry.yaml", "LLM Foundry's own settings: a path, or a name next to train.py")
    packing_ratio: float = key(1.0, "rows of data packed into one sequence, on average; 1: none are packed", minimum=1)


@dataclass
class Config(BaseConfig):
    foundry: FoundryConfig = field(default_factory=FoundryConfig)
