"""Rows of any prompt-response data as LLM Foundry reads them: JSON lines of `prompt`, `response` and their tokens.

    python llm-foundry-finetune/prepare_data.py [--config FILE] [key=value ...]

writes `foundry/train.jsonl` and `foundry/eval.jsonl` into the run folder. train.py does the same by itself.

The training file holds the rows in the order of training, step by step and epoch after epoch, so that Foundry, which
does not shuffle it, sees in each step the very rows that the other projects see. It sees the very tokens, too: Foundry
would tokenize prompt and response apart, which gives others if a token crosses their border. With
data.packing=documents a line is a block, and has the tokens of several rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from settings import Config

from common import data, errors, models
from common.config import parse_config
from common.errors import UserError
from common.loss import IGNORE
from common.packing import documents_of


class Prepared(NamedTuple):
    """What was written, and what follows from it."""

    train_file: Path
    eval_file: Path
    rows: int  # lines of train_file
    eval_rows: int
    steps_per_epoch: int
    total_steps: int
    fingerprint: str  # of the tokens of an epoch: equal for equal data
    digest: str  # of train_file's rows, by `digest`
    counts: dict  # what became of the rows of data


def check_data_settings(cfg: Config) -> None:
    """Raise `UserError` for settings of data that Foundry's finetuning loader has no counterpart for."""
    if cfg.data.format != "prompt-response":
        raise UserError(
            f"data.format={cfg.data.format}: LLM Foundry is given prompts and responses here: set it to "
            f"prompt-response, with data.prompt_column and data.response_column, or take pytorch-fsdp"
        )
    if cfg.data.packing == "wrapped":
        raise UserError(
            "data.packing=wrapped: LLM Foundry takes whole rows, which it does not cut into blocks: set it to "
            "documents or none"
        )
    if cfg.data.packing == "documents" and cfg.foundry.packing_ratio > 1:
        raise UserError(
            f"foundry.packing_ratio={cfg.foundry.packing_ratio:g}: data.packing=documents packs the rows already: set "
            f"foundry.packing_ratio=1, or data.packing=none"
        )


def rows_per_step(cfg: Config, world_size: int) -> int:
    """Lines of the file that an optimizer step takes; more than its sequences if Foundry packs them."""
    return world_size * int(cfg.train.global_batch_size // world_size * cfg.foundry.packing_ratio)


def prepare(cfg: Config, tokenizer, folder: Path, world_size: int) -> Prepared:
    """Write the two files into `folder`. Raises `UserError` for what loading and tokenizing data raises."""
    check_data_settings(cfg)
    training, held_out = data.load_rows(cfg.data, cfg.seed)
    whole = dataclasses.replace(cfg.data, packing="none")
    cached = data.cached_rows(whole, cfg.seed, tokenizer, show_progress=True)
    rows, held_out_rows = _learnable(cached["training"]), _learnable(cached["held_out"])
    if cfg.data.packing == "documents":
        rows = data.in_blocks(rows, cfg.data.max_length)
    # The steps of the other projects, in which a global batch is sorted by length.
    train = dataclasses.replace(cfg.train, global_batch_size=rows_per_step(cfg, world_size))
    sampler = data.StepSampler(rows, dataclasses.replace(cfg, train=train), rank=0, world_size=1)
    folder.mkdir(parents=True, exist_ok=True)
    train_file, eval_file = folder / "train.jsonl", folder / "eval.jsonl"
    order = [i for step in sampler for i in step]
    _write(train_file, training, rows, order, cfg)
    _write(eval_file, held_out, held_out_rows, range(len(held_out_rows)), cfg)
    return Prepared(
        train_file=train_file,
        eval_file=eval_file,
        rows=len(order),
        eval_rows=len(held_out_rows),
        steps_per_epoch=sampler.steps_per_epoch,
        total_steps=sampler.total_steps,
        fingerprint=rows.fingerprint(),
        digest=digest(rows[order[i]]["input_ids"].tolist() for i in sampled(len(order))),
        counts={"training": rows.counts, "held_out": held_out_rows.counts},
    )


def _learnable(tokenized: data.TokenizedRows) -> data.TokenizedRows:
    """The tokens of the rows that Foundry keeps: none without a token before the response."""
    starts = tokenized.offsets[:-1]
    kept = tokenized.labels[starts] == IGNORE
    if kept.all():
        return tokenized
    if not kept.any():
        raise UserError(
            "data.prompt_template: LLM Foundry needs a prompt before each response, and none of these has one"
        )
    in_kept = np.repeat(kept, tokenized.lengths)
    counts = tokenized.counts | {"kept": int(kept.sum())}
    counts["dropped"] = counts["dropped"] | {"LLM Foundry needs a prompt before the response": int((~kept).sum())}
    return data.TokenizedRows(
        tokenized.tokens[in_kept],
        tokenized.labels[in_kept],
        np.concatenate([[0], np.cumsum(tokenized.lengths[kept])]),
        tokenized.sources[kept],
        counts,
    )


def _write(file: Path, texts, rows: data.TokenizedRows, order: Iterable[int], cfg: Config) -> None:
    """A line per row: each document's tokens and how many of the last are targets, and the texts of one by itself."""
    prompts, responses = data.render_prompts(texts[:], cfg.data), texts[cfg.data.response_column]
    with file.open("w", encoding="utf-8") as lines:
        for i in order:
            line: dict[str, Any] = {
                "documents": [
                    {"tokens": document["input_ids"].tolist(), "targets": int((document["labels"] != IGNORE).sum())}
                    for document in documents_of(rows[i])
                ]
            }
            if rows.sources is not None:  # for those who read the file
                source = rows.sources[i]
                line = {"prompt": prompts[source], "response": responses[source]} | line
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def sampled(rows: int) -> range:
    """A thousand rows, or all: enough to know a file by."""
    return range(0, rows, max(1, rows // 1000))


def digest(rows: Iterable[list[int]]) -> str:
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def read_line(row: dict[str, str]) -> dict[str, Any]:
    """What `_write` wrote; foundry.yaml names this function."""
    return json.loads(row["text"])


def tokens_of_line(line: dict[str, Any], tokenizer) -> dict[str, list[dict[str, list[int]]]]:
    """A line as Foundry has it after tokenizing: a turn per document, its prompt `input_ids`, its response `labels`."""
    borders = [(document["tokens"], len(document["tokens"]) - document["targets"]) for document in line["documents"]]
    return {"turns": [{"input_ids": tokens[:border], "labels": tokens[border:]} for tokens, border in borders]}


def main() -> None:
    cfg = parse_config(Config, __file__)
    folder = Path(cfg.output_dir) / "foundry"
    prepared = prepare(cfg, models.load_tokenizer(cfg.model), folder, world_size=1)
    print(f"{prepared.train_file}: {prepared.rows:,} rows, {prepared.total_steps:,} steps")
    print(f"{prepared.eval_file}: {prepared.eval_rows:,} rows, held out")
    for part, counts in prepared.counts.items():
        print(f"{part.replace('_', '-')}: {data.describe_counts(counts)}")


if __name__ == "__main__":
    errors.run(main)
