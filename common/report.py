"""What a run folder holds, as tables. Reads its JSON files only: no torch, no framework."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.json_lines import JsonLines

MISSING = "–"


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The records of `metrics.jsonl`; none if there is no such file."""
    return JsonLines(Path(run_dir) / "metrics.jsonl").read()


def read_json(path: Path) -> dict:
    """A JSON file's content, empty if there is no such file. Raises `UserError` if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def read_summary(run_dir: str | Path) -> dict:
    """`summary.json`; for a run that is still running, was killed or failed, also what `metrics.jsonl` holds.

    Raises `UserError` if the folder has neither.
    """
    summary, points = read_json(Path(run_dir) / "summary.json"), series(read_metrics(run_dir), "loss")
    if not summary and not points:
        raise UserError(f"{run_dir}: neither summary.json nor metrics.jsonl: train first, or name another run folder")
    losses: list[float | None] = list(points.values()) or [None]
    known = {"status": "unfinished", "steps": max(points, default=0), "first_loss": losses[0], "last_loss": losses[-1]}
    return known | summary


def series(metrics: list[dict], key: str) -> dict[int, float]:
    """Step to value, in order. A step that was repeated after a resume counts once, as it ran last."""
    return dict(sorted({m["step"]: m[key] for m in metrics if m.get(key) is not None}.items()))


def print_summary(run_dir: str | Path) -> None:
    """A table of one run, and where everything lies. Raises `UserError` for a folder without a run."""
    run_dir, summary = Path(run_dir), read_summary(run_dir)
    print(f"\n{summary.get('project', run_dir.name)}")
    for label, value in summary_lines(summary):
        print(f"  {label:<16} {value}")
    if "error" in summary:
        print(f"  {'error':<16} {summary['error']}")
    files = ["metrics.jsonl", "summary.json", "plots", "checkpoints", "model", "eval.json", "samples.md"]
    print(f"\nin {run_dir}:\n  {'  '.join(name for name in files if (run_dir / name).exists())}")


def summary_lines(summary: dict) -> list[tuple[str, str]]:
    """Label and value of each figure of a `summary.json`; MISSING for what was not measured."""

    def show(key: str, form: str, unit: str = "") -> str:
        return MISSING if summary.get(key) is None else f"{summary[key]:{form}}{unit}"

    return [
        ("status", summary["status"]),
        ("steps", show("steps", ",")),
        ("training loss", f"{show('first_loss', '.4f')} → {show('last_loss', '.4f')}"),
        ("held-out loss", f"{show('eval_loss_before', '.4f')} → {show('eval_loss_after', '.4f')}"),
        ("tokens/s", show("tokens_per_second", ",.0f")),
        ("MFU", show("mfu", ".1%")),
        ("peak GPU", show("peak_gpu_gib", ".2f", " GiB")),
        ("peak host", show("peak_host_gib", ".2f", " GiB")),
        ("time", show("seconds", ",.0f", " s")),
        ("start-up", _start_up(summary.get("startup", {}))),
    ]


def _start_up(seconds: dict[str, float]) -> str:
    """Such as `31.2 s: imports 12.0, data 0.5, model 8.1, first step 10.6`; MISSING if no step was made."""
    if "total" not in seconds:
        return MISSING
    phases = (f"{name.replace('_', ' ')} {value:.1f}" for name, value in seconds.items() if name != "total")
    return f"{seconds['total']:.1f} s: {', '.join(phases)}"


def devices(environment: dict, kind: str = "") -> str:
    """Where the run of an `environment.json` computed, such as `2 × Tesla T4 (14.7 GiB)`.

    `kind` is the type of the device in use; without it, GPUs that are there were used.
    """
    ranks = environment.get("world_size")
    if not ranks:
        return MISSING
    gpus = [] if kind == "cpu" else environment.get("gpus", [])
    if not gpus:
        return "1 CPU process" if ranks == 1 else f"{ranks} CPU processes"
    each = f"{gpus[0]['name']} ({gpus[0]['memory_gib']:.1f} GiB)"
    share = environment.get("gpu_share", "").partition(" of ")[0]
    return f"{ranks} × {share + ' of ' if share else ''}{each}"


def print_table(rows: list[list[str]]) -> None:
    """Aligned columns: the first left, the other ones right; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
        if number == 0:
            print("-" * (sum(widths) + 2 * len(widths) - 2))


# What an evaluation measures: label with its direction, key in eval.json, number format.
FIGURES = [
    ("loss (nats) ↓", "loss", ".4f"),
    ("perplexity ↓", "perplexity", ",.2f"),
    ("token accuracy ↑", "token_accuracy", ".1%"),
    ("bits per byte ↓", "bits_per_byte", ".4f"),
    ("ROUGE-L ↑", "rouge_l", ".3f"),
    ("exact match ↑", "exact_match", ".1%"),
]


def evaluation_rows(results: dict[str, Any]) -> list[list[str]]:
    """`eval.json` as a table: a heading, then base, fine-tuned and change for each figure that was measured."""
    base, tuned = results["base"], results["fine_tuned"]
    rows = [[f"{results['rows']:,} held-out rows", "base", "fine-tuned", "change"]]
    for label, key, form in FIGURES:
        if base.get(key) is not None:
            rows.append([label, f"{base[key]:{form}}", f"{tuned[key]:{form}}", f"{tuned[key] - base[key]:+{form}}"])
    return rows
