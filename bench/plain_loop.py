"""The reference: one process, transformers' own loss, torch's AdamW, and nothing of ours but the rows.

    python bench/plain_loop.py bench/tasks/gsm8k.yaml SEED OUTPUT.json data.name=FILE train.precision=bf16

SEED decides the order of the training rows, and nothing else: which rows are held out is the configuration's `seed`, so
that losses of several seeds can be compared. Their spread is what chance alone does to a run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import torch

from common import data, models, runtime
from common.config import BaseConfig, load_config
from common.loss import IGNORE
from common.packing import documents_of
from common.schedule import lr_schedule


def train(config: Path, settings: list[str], seed: int | None = None) -> dict:
    """`losses` and `grad_norms` by step, the held-out loss before and after; `seed` orders the training rows."""
    cfg = load_config(BaseConfig, config, settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, reason = runtime.resolve_precision(cfg.train.precision, device)
    tokenizer = models.load_tokenizer(cfg.model)
    training, held_out = data.load_rows(cfg.data, cfg.seed)
    rows = data.tokenize(training, cfg.data, tokenizer)
    held_out_rows = data.tokenize(held_out, cfg.data, tokenizer, packing="none")
    model = models.load_model(cfg.model, cfg.seed).to(device).train()
    groups = models.parameter_groups(model, cfg.train.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cfg.train.learning_rate)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    order = cfg if seed is None else dataclasses.replace(cfg, seed=seed)
    steps = data.StepSampler(rows, order, rank=0, world_size=1)
    schedule = lr_schedule(cfg, optimizer, steps.total_steps)

    def summed_loss(chosen: list) -> tuple[torch.Tensor, int]:
        """Sum of the token losses, and of how many. No mask: padding is on the right, where no token looks."""
        batch = {k: v.to(device) for k, v in data.collate(chosen, tokenizer.pad_token_id).items()}
        targets = batch["labels"][:, 1:].ne(IGNORE).sum().item()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(**batch).loss * targets, targets

    @torch.no_grad()
    def evaluate() -> float:
        size = cfg.eval.batch_size
        parts = [
            summed_loss([held_out_rows[i] for i in range(start, min(start + size, len(held_out_rows)))])
            for start in range(0, len(held_out_rows), size)
        ]
        return sum(loss.item() for loss, _ in parts) / sum(targets for _, targets in parts)

    losses, norms, before = [], [], evaluate()
    for indices in steps:
        chosen = [document for i in indices for document in documents_of(rows[i])]  # packed documents one by one
        targets = sum(row["labels"][1:].ne(IGNORE).sum().item() for row in chosen)
        total = 0.0
        for start in range(0, len(chosen), cfg.train.micro_batch_size):
            loss, _ = summed_loss(chosen[start : start + cfg.train.micro_batch_size])
            scaler.scale(loss / targets).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.max_grad_norm or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total / targets)
        norms.append(norm.item() if norm.isfinite() else None)  # not finite: the scaler skips the step
    return {
        "losses": losses,
        "grad_norms": norms,
        "eval_loss_before": before,
        "eval_loss_after": evaluate(),
        "environment": runtime.describe_environment(1, reason),
    }


def main(config: str, seed: str, output: str, *settings: str) -> None:
    record = train(Path(config), list(settings), int(seed))
    record["losses"] = [round(loss, 6) for loss in record["losses"]]
    Path(output).write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
