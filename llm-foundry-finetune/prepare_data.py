"""Rows of any prompt-response data as LLM Foundry reads them: JSON lines of `prompt` and `response`.

    python llm-foundry-finetune/prepare_data.py [--config FILE] [key=value ...]

writes `foundry/train.jsonl` and `foundry/eval.jsonl` into the run folder. train.py does the same by itself.

The training file holds the rows in the order of training, step by step and epoch after epoch, so that Foundry, which
does not shuffle it, sees in each step the very rows that the other projects see.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from settings import Config

from common import data, errors, models
from common.config import BaseConfig, parse_config
from common.errors import UserError


class Prepared(NamedTuple):
    """What was written, and what follows from it."""

    train_file: Path
    eval_file: Path
    rows: int  # lines of train_file
    eval_rows: int
    steps_per_epoch: int
    total_steps: int
    fingerprint: str  # of the tokens of an epoch: equal for equal data


def check_data_settings(cfg: BaseConfig) -> None:
    """Raise `UserError` for settings of data that Foundry's finetuning loader has no counterpart for."""
    if cfg.data.format != "prompt-response":
        raise UserError(
            f"data.format={cfg.data.format}: LLM Foundry is given prompts and responses here: set it to "
            f"prompt-response, with data.prompt_column and data.response_column, or take pytorch-fsdp"
        )
    if cfg.data.packing != "none":
        raise UserError(
            f"data.packing={cfg.data.packing}: LLM Foundry packs whole rows into a sequence, and does not cut them "
            f"into blocks: set data.packing=none, and foundry.packing_ratio to the rows a sequence"
        )


def rows_per_step(cfg: Config, world_size: int) -> int:
    """Rows of data that an optimizer step takes; more than its sequences where rows are packed."""
    return world_size * int(cfg.train.global_batch_size // world_size * cfg.foundry.packing_ratio)


def prepare(cfg: Config, tokenizer, folder: Path, world_size: int) -> Prepared:
    """Write the two files into `folder`. Raises `UserError` for what loading and tokenizing data raises."""
    check_data_settings(cfg)
    training, held_out = data.load_rows(cfg.data, cfg.seed)
    training, rows = _learnable(training, cfg, tokenizer)
    held_out, held_out_rows = _learnable(held_out, cfg, tokenizer)
    # The steps of the other projects, in which a global batch is sorted by length.
    train = dataclasses.replace(cfg.train, global_batch_size=rows_per_step(cfg, world_size))
    sampler = data.StepSampler(rows, dataclasses.replace(cfg, train=train), rank=0, world_size=1)
    folder.mkdir(parents=True, exist_ok=True)
    train_file, eval_file = folder / "train.jsonl", folder / "eval.jsonl"
    prompts = data.render_prompts(training[:], cfg.data)
    responses = training[cfg.data.response_column]
    with train_file.open("w", encoding="utf-8") as file:
        for step in sampler:
            file.writelines(_line(prompts[i], responses[i]) for i in step)
    prompts = data.render_prompts(held_out[:], cfg.data)
    lines = map(_line, prompts, held_out[cfg.data.response_column])
    eval_file.write_text("".join(lines), encoding="utf-8")
    return Prepared(
        train_file=train_file,
        eval_file=eval_file,
        rows=sampler.total_steps * sampler.size,
        eval_rows=len(held_out_rows),
        steps_per_epoch=sampler.steps_per_epoch,
        total_steps=sampler.total_steps,
        fingerprint=rows.fingerprint(),
    )


def _learnable(rows, cfg: Config, tokenizer):
    """The rows that Foundry keeps, and their tokens: none without prompt, response, or room for a response."""
    prompts = data.render_prompts(rows[:], cfg.data)
    responses = rows[cfg.data.response_column]
    rows = rows.select([i for i in range(len(rows)) if prompts[i] and responses[i]])
    tokenized = data.tokenize(rows, cfg.data, tokenizer)
    return rows.select(tokenized.sources), tokenized


def _line(prompt: str, response: str) -> str:
    return json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False) + "\n"


def read_line(row: dict[str, str]) -> dict[str, str]:
    """What `_line` wrote; foundry.yaml names this function."""
    return json.loads(row["text"])


def main() -> None:
    cfg = parse_config(Config, __file__)
    folder = Path(cfg.output_dir) / "foundry"
    prepared = prepare(cfg, models.load_tokenizer(cfg.model), folder, world_size=1)
    print(f"{prepared.train_file}: {prepared.rows:,} rows, {prepared.total_steps:,} steps")
    print(f"{prepared.eval_file}: {prepared.eval_rows:,} rows, held out")


if __name__ == "__main__":
    errors.run(main)
