"""What a run folder says, as tables and plots: `python -m common.report RUN_DIR [RUN_DIR ...]`.

Reads the folder's JSON files and `config.yaml`, so it needs neither torch nor the framework that wrote them. One
folder: its table and plots. Several: a table with one line per run, and a plot of them side by side; runs of different
models or data are kept apart, since their losses cannot be compared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from common import errors
from common.errors import UserError
from common.json_lines import JsonLines

MISSING = "–"


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The records of `metrics.jsonl`; none where there is no such file."""
    return JsonLines(Path(run_dir) / "metrics.jsonl").read()


def read_json(path: Path) -> dict:
    """A JSON file's content, empty where there is no such file. Raises `UserError` where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def read_summary(run_dir: str | Path) -> dict:
    """`summary.json`; of a run that is going on, was killed or failed, also what `metrics.jsonl` tells.

    Raises `UserError` where the folder has neither.
    """
    summary, points = read_json(Path(run_dir) / "summary.json"), series(read_metrics(run_dir), "loss")
    if not summary and not points:
        raise UserError(f"{run_dir}: neither summary.json nor metrics.jsonl: train first, or name another run folder")
    losses = list(points.values()) or [None]
    known = {"status": "unfinished", "steps": max(points, default=0), "first_loss": losses[0], "last_loss": losses[-1]}
    return known | summary


def series(metrics: list[dict], key: str) -> dict[int, float]:
    """Step to value, in order. A step that was repeated after a resume counts once, as it ran last."""
    return dict(sorted({m["step"]: m[key] for m in metrics if m.get(key) is not None}.items()))


def print_summary(run_dir: str | Path) -> None:
    """A table of one run, and where everything lies. Raises `UserError` for a folder without a run."""
    run_dir, summary = Path(run_dir), read_summary(run_dir)
    print(f"\n{summary.get('project', run_dir.name)}")
    for label, value in _summary_lines(summary):
        print(f"  {label:<16} {value}")
    if "error" in summary:
        print(f"  {'error':<16} {summary['error']}")
    files = ["metrics.jsonl", "summary.json", "plots", "checkpoints", "model", "eval.json", "samples.md"]
    print(f"\nin {run_dir}:\n  {'  '.join(name for name in files if (run_dir / name).exists())}")


def _summary_lines(summary: dict) -> list[tuple[str, str]]:
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
    ]


def print_comparison(run_dirs: list[Path]) -> None:
    """One line per run, in a table for each model and data; what else differs has a column and a note.

    Raises `UserError` for a folder without a run.
    """
    columns = ["status", "steps", "held-out loss", "tokens/s", "MFU", "peak GPU", "peak host", "time"]
    labels, groups = run_labels(run_dirs), comparable(run_dirs)
    names = {run_dir: label for label, run_dir in labels.items()}
    for number, group in enumerate(groups):
        conditions = [run_conditions(run_dir) for run_dir in group]
        differing = [key for key in conditions[0] if len({c[key] for c in conditions}) > 1]
        equal = [f"{k}: {v}" for k, v in conditions[0].items() if k not in differing and v != MISSING]
        if number:
            print()
        if equal:
            print("  ".join(equal))
        rows = [["run", *differing, *columns]]
        for run_dir, condition in zip(group, conditions, strict=True):
            values = dict(_summary_lines(read_summary(run_dir)))
            rows.append([names[run_dir], *(condition[k] for k in differing), *(values[column] for column in columns)])
        print_table(rows)
        if differing:
            print(f"note: these runs differ in {', '.join(differing)}: {_what_to_compare(differing)}")
    if len(groups) > 1:
        print(
            f"\nnote: {len(groups)} tables: losses, and speeds, can only be compared between runs of one model and the "
            f"same data"
        )


def _what_to_compare(differing: list[str]) -> str:
    notes = []
    if {"devices", "precision", "tokens", "batch"} & set(differing):
        notes += ["speed and memory follow from that, not from the project alone"]
    if {"batch", "seed"} & set(differing):
        notes += ["the same step is not the same point of the training"]
    return "; ".join(notes)


def comparable(run_dirs: list[Path]) -> list[list[Path]]:
    """The runs, in groups of one model and the same data, in the order in which these first appear."""
    groups: dict[tuple[str, str], list[Path]] = {}
    for run_dir in run_dirs:
        conditions = run_conditions(run_dir)
        groups.setdefault((conditions["model"], conditions["data"]), []).append(run_dir)
    return list(groups.values())


def run_conditions(run_dir: Path) -> dict[str, str]:
    """What a run's figures depend on besides its project. Unknown of a folder without `config.yaml`."""
    try:
        cfg = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        model, data, train = cfg["model"], cfg["data"], cfg["train"]
        subset = f"/{data['subset']}" if data.get("subset") else ""
        known = {
            "model": model["name"] + (" (random weights)" if model.get("random_weights") else ""),
            "data": f"{data['name']}{subset}, {data['format']}, {data['eval_rows']} held out",
            "tokens": f"up to {data['max_length']}" + (", packed" if data["packing"] != "none" else ""),
            "batch": f"{train['global_batch_size']} ({train['micro_batch_size']} at once)",
            "seed": str(cfg["seed"]),
        }
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        known = dict.fromkeys(("model", "data", "tokens", "batch", "seed"), MISSING)
    environment = read_json(run_dir / "environment.json")
    known["devices"] = devices(environment)
    known["precision"] = environment.get("precision", MISSING).partition(":")[0]
    return known


def devices(environment: dict, kind: str = "") -> str:
    """What an `environment.json` says of where the run computed, such as `2 × Tesla T4 (14.7 GiB)`.

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
    """Aligned columns: the first to the left, the others to the right; the first row is the heading."""
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


def run_labels(run_dirs: list[Path]) -> dict[str, Path]:
    """A short name for each run: its project, with its folder's name where a project has several runs here."""
    projects = [read_summary(p).get("project", p.name) for p in run_dirs]
    names = [p if projects.count(p) == 1 else f"{p}/{d.name}" for p, d in zip(projects, run_dirs, strict=True)]
    unique = len(set(names)) == len(names)
    return dict(zip(names if unique else map(str, run_dirs), run_dirs, strict=True))


def main() -> None:
    from common import plots

    run_dirs = [Path(argument) for argument in sys.argv[1:]]
    if not run_dirs:
        raise UserError("usage: python -m common.report RUN_DIR [RUN_DIR ...]")
    if len(run_dirs) == 1:
        plots.plot_training(run_dirs[0])
        print_summary(run_dirs[0])
    else:
        print_comparison(run_dirs)
        print(f"\nplot: {plots.plot_comparison(run_dirs)}")


if __name__ == "__main__":
    errors.run(main)
