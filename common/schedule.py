"""The learning rate by step, from transformers' schedules."""

from __future__ import annotations

import warnings

import torch
import transformers

from common.config import BaseConfig


def lr_schedule(
    cfg: BaseConfig, optimizer: torch.optim.Optimizer, total_steps: int, first_step: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over `train.warmup_steps`, then `train.lr_schedule` (to 0 at `total_steps`, unless constant).

    A function of the step alone: it is rebuilt at `first_step`, never saved, so that a run that continues with more
    steps is on their schedule at once. Build it after the optimizer's state is loaded.
    """
    # A step that the loss scaler skips calls no `optimizer.step`, nor do DeepSpeed's own steps.
    warnings.filterwarnings("ignore", r".*`lr_scheduler.step\(\)` before", UserWarning)
    for group in optimizer.param_groups:
        group["initial_lr"] = cfg.train.learning_rate
    warmup, last = cfg.train.warmup_steps, first_step - 1
    if cfg.train.lr_schedule == "constant":
        return transformers.get_constant_schedule_with_warmup(optimizer, warmup, last_epoch=last)
    if cfg.train.lr_schedule == "linear":
        return transformers.get_linear_schedule_with_warmup(optimizer, warmup, total_steps, last_epoch=last)
    return transformers.get_cosine_schedule_with_warmup(optimizer, warmup, total_steps, last_epoch=last)
