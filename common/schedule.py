"""The learning rate by step, from transformers' schedules."""

from __future__ import annotations

import torch
from transformers import get_scheduler

from common.config import BaseConfig


def lr_schedule(
    cfg: BaseConfig, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over `train.warmup_steps`, then `train.lr_schedule` (to 0 at `total_steps`, unless constant)."""
    name = {"constant": "constant_with_warmup"}.get(cfg.train.lr_schedule, cfg.train.lr_schedule)
    return get_scheduler(name, optimizer, cfg.train.warmup_steps, total_steps)
