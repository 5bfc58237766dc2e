"""Compare runs: `python -m tools.compare RUN_DIR [RUN_DIR ...]`, or `make compare`.

One folder: its table and plots. Several: a table with one line per run, and a plot of them next to each other. Runs of
different models or data are kept apart, since their losses cannot be compared. Reads a folder's JSON files and
`config.yaml`, so it needs neither torch nor the framework that wrote them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from common import errors, plots
from common.errors import UserError
from common.plots import look, save_figure, smoothed, style_axes
from common.report import (
    MISSING,
    devices,
    print_summary,
    print_table,
    read_json,
    read_metrics,
    read_summary,
    series,
    summary_lines,
)


def print_comparison(run_dirs: list[Path]) -> None:
    """One line per run, in a table for each model and data; what else differs has a column and a note.

    Raises `UserError` for a folder without a run.
    """
    columns = ["status", "steps", "held-out loss", "tokens/s", "MFU", "peak GPU", "peak host", "time"]
    groups = comparable(run_dirs)
    names = labels(run_dirs)
    for number, group in enumerate(groups):
        known = [conditions(run_dir) for run_dir in group]
        differing = [key for key in known[0] if len({c[key] for c in known}) > 1]
        equal = [f"{k}: {v}" for k, v in known[0].items() if k not in differing and v != MISSING]
        if number:
            print()
        if equal:
            print("  ".join(equal))
        rows = [["run", *differing, *columns]]
        for run_dir, condition in zip(group, known, strict=True):
            values = dict(summary_lines(read_summary(run_dir)))
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
        known = conditions(run_dir)
        groups.setdefault((known["model"], known["data"]), []).append(run_dir)
    return list(groups.values())


def conditions(run_dir: Path) -> dict[str, str]:
    """What a run's figures depend on in addition to its project. Unknown of a folder without `config.yaml`."""
    try:
        cfg = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        model, data, train = cfg["model"], cfg["data"], cfg["train"]
        subset = f"/{data['subset']}" if data.get("subset") else ""
        known = {
            "model": model["name"] + (" (random weights)" if model.get("random_weights") else ""),
            "data": f"{data['name']}{subset}, {data['format']}, {data['eval_rows']} held out",
            "tokens": f"up to {data['max_length']}" + (f", {data['packing']}" if data["packing"] != "none" else ""),
            "batch": f"{train['global_batch_size']} ({train['micro_batch_size']} at once)",
            "seed": str(cfg["seed"]),
        }
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        known = dict.fromkeys(("model", "data", "tokens", "batch", "seed"), MISSING)
    environment = read_json(run_dir / "environment.json")
    known["devices"] = devices(environment)
    known["precision"] = environment.get("precision", MISSING).partition(":")[0]
    return known


def labels(run_dirs: list[Path]) -> dict[Path, str]:
    """A short name for each run: its project, with its folder's name if a project has several runs here."""
    projects = [read_summary(p).get("project", p.name) for p in run_dirs]
    names = [p if projects.count(p) == 1 else f"{p}/{d.name}" for p, d in zip(projects, run_dirs, strict=True)]
    unique = len(set(names)) == len(names)
    return dict(zip(run_dirs, names if unique else map(str, run_dirs), strict=True))


def plot_comparison(run_dirs: list[Path]) -> Path:
    """Draw the runs' losses and throughputs side by side: `comparison.png` in the folder that holds them all.

    A row for each model and data: as in `print_comparison`, only what can be compared shares an axis.
    """
    groups = comparable(run_dirs)
    names = labels(run_dirs)
    figure = Figure(figsize=(12, 4.5 * len(groups)), dpi=120, layout="constrained")
    for group, (losses, speeds) in zip(groups, figure.subplots(len(groups), 2, squeeze=False), strict=True):
        shared = conditions(group[0])
        what = f"\n{shared['model']} on {shared['data'].partition(',')[0]}" if len(groups) > 1 else ""
        style_axes(losses, f"training loss, smoothed{what}", "loss (nats per token)")
        style_axes(speeds, "throughput", "tokens/s, all processes", x_label="")
        for i, run_dir in enumerate(group):
            points = series(read_metrics(run_dir), "loss")
            losses.plot(list(points), smoothed(list(points.values())), label=names[run_dir], linewidth=2, **look(i))
        losses.legend(fontsize=9)
        values = [read_summary(run_dir).get("tokens_per_second") or 0 for run_dir in group]
        colours = [look(i)["color"] for i in range(len(group))]
        bars = speeds.barh([names[run_dir] for run_dir in group], values, color=colours)
        speeds.bar_label(bars, [f"{v:,.0f}" if v else MISSING for v in values], padding=4, fontsize=9)
        speeds.set(xlabel="tokens/s, all processes", ylabel="", xlim=(0, max(values) * 1.2 or 1))
        speeds.invert_yaxis()
        speeds.grid(axis="y", visible=False)
        speeds.xaxis.set_major_formatter("{x:,.0f}")
    return save_figure(figure, Path(os.path.commonpath([p.resolve() for p in run_dirs])) / "comparison.png")


def main() -> None:
    """Print and plot the run folders of the command line; a single one is plotted by itself."""
    run_dirs = [Path(argument) for argument in sys.argv[1:]]
    if not run_dirs:
        raise UserError("usage: python -m tools.compare RUN_DIR [RUN_DIR ...]")
    if len(run_dirs) == 1:
        plots.plot_training(run_dirs[0])
        print_summary(run_dirs[0])
    else:
        print_comparison(run_dirs)
        print(f"\nplot: {plot_comparison(run_dirs)}")


if __name__ == "__main__":
    errors.run(main)
