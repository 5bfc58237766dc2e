"""What a run folder says, as tables and plots: `python -m common.report RUN_DIR [RUN_DIR ...]`.

Reads the folder's JSON files and `config.yaml`, so it needs neither torch nor the framework that wrote them. One
folder: its table and plots. Several: a table with one line per run, and a plot of them side by side; runs of different
models or data are kept apart, since their losses cannot be compared.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global state, and nothing that looks for a screen
from matplotlib.ticker import PercentFormatter

from common import errors
from common.errors import UserError
from common.json_lines import JsonLines

# Okabe and Ito's palette, told apart with every kind of colour blindness: https://jfly.uni-koeln.de/color/
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINE_STYLES = ["-", "--", "-.", ":"]
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
    labels, groups = _labels(run_dirs), comparable(run_dirs)
    names = {run_dir: label for label, run_dir in labels.items()}
    for number, group in enumerate(groups):
        conditions = [_conditions(run_dir) for run_dir in group]
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
        conditions = _conditions(run_dir)
        groups.setdefault((conditions["model"], conditions["data"]), []).append(run_dir)
    return list(groups.values())


def _conditions(run_dir: Path) -> dict[str, str]:
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


def plot_training(run_dir: str | Path) -> list[Path]:
    """Draw `plots/loss.png`, `learning_rate.png`, `throughput.png` and `memory.png`; the paths of those drawn.

    A figure that the run did not measure (GPU memory on a CPU) is left out, and a plot without any is not drawn.
    """
    metrics, folder, paths = read_metrics(run_dir), Path(run_dir) / "plots", []
    name = read_json(Path(run_dir) / "summary.json").get("project", Path(run_dir).name)
    for file, title, unit, draw in (
        ("loss", "loss", "loss (nats a token)", _draw_loss),
        ("learning_rate", "learning rate", "learning rate", _draw_learning_rate),
        ("throughput", "throughput", "tokens/s, all processes", _draw_throughput),
        ("memory", "peak memory", "peak so far (GiB)", _draw_memory),
    ):
        figure, axes = _new_figure(f"{name}: {title}", unit)
        draw(axes, metrics)
        if axes.lines:
            paths.append(save_figure(figure, folder / f"{file}.png"))
    return paths


def _draw_loss(axes: Axes, metrics: list[dict]) -> None:
    training, held_out = series(metrics, "loss"), series(metrics, "eval_loss")
    if training:
        smooth = smoothed(list(training.values()))
        axes.plot(*_xy(training), color=COLOURS[0], alpha=0.3, linewidth=1, label="training, each step")
        axes.plot(list(training), smooth, color=COLOURS[0], linewidth=2, label="training, smoothed")
    if held_out:
        axes.plot(*_xy(held_out), "o--", color=COLOURS[1], linewidth=1, markersize=7, label="held-out")
    if training or held_out:
        axes.legend()


def _draw_learning_rate(axes: Axes, metrics: list[dict]) -> None:
    if points := series(metrics, "learning_rate"):
        axes.plot(*_xy(points), color=COLOURS[0], linewidth=2)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4), useMathText=True)


def _draw_throughput(axes: Axes, metrics: list[dict]) -> None:
    if points := series(metrics, "tokens_per_second"):
        median = statistics.median(points.values())
        axes.plot(*_xy(points), color=COLOURS[0], linewidth=1.5, label="each step")
        axes.axhline(median, color=COLOURS[1], linestyle="--", label=f"median step {median:,.0f}")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.legend()


def _draw_memory(axes: Axes, metrics: list[dict]) -> None:
    for key, label, colour, style in (
        ("peak_gpu_gib", "GPU (allocated)", COLOURS[0], "-"),
        ("peak_host_gib", "host memory", COLOURS[1], "--"),
    ):
        points = series(metrics, key)
        if any(points.values()):  # on a CPU the GPU's peak is 0
            axes.plot(*_xy(points), color=colour, linestyle=style, linewidth=2, label=label)
            axes.set_ylim(0, axes.dataLim.y1 * 1.3)  # room for the legend above the lines
            axes.legend(loc="upper right", ncols=2)


def smoothed(values: list[float]) -> list[float]:
    """Mean over a tenth of the run around each step: a trailing average would lag behind.

    Less at the beginning, where the loss falls fastest; at the end, the straight line that fits the last tenth.
    """
    reach = len(values) // 20
    inner = len(values) - reach
    means = [statistics.fmean(values[i - r : i + r + 1]) for i, r in enumerate(min(reach, i) for i in range(inner))]
    if not reach:
        return means
    tenth = values[-2 * reach - 1 :]
    slope, intercept = statistics.linear_regression(range(len(tenth)), tenth)
    return means + [intercept + slope * i for i in range(reach + 1, len(tenth))]


def plot_comparison(run_dirs: list[Path]) -> Path:
    """Draw the runs' losses and throughputs side by side: `comparison.png` in the folder that holds them all.

    A row for each model and data: as in `print_comparison`, only what can be compared shares an axis.
    """
    groups, labels = comparable(run_dirs), _labels(run_dirs)
    names = {run_dir: label for label, run_dir in labels.items()}
    figure = Figure(figsize=(12, 4.5 * len(groups)), dpi=120, layout="constrained")
    for group, (losses, speeds) in zip(groups, figure.subplots(len(groups), 2, squeeze=False), strict=True):
        conditions = _conditions(group[0])
        what = f"\n{conditions['model']} on {conditions['data'].partition(',')[0]}" if len(groups) > 1 else ""
        style_axes(losses, f"training loss, smoothed{what}", "loss (nats per token)")
        style_axes(speeds, "throughput", "tokens/s, all processes", x_label="")
        for i, run_dir in enumerate(group):
            points = series(read_metrics(run_dir), "loss")
            losses.plot(list(points), smoothed(list(points.values())), label=names[run_dir], linewidth=2, **_look(i))
        losses.legend(fontsize=9)
        values = [read_summary(run_dir).get("tokens_per_second") or 0 for run_dir in group]
        colours = [_look(i)["color"] for i in range(len(group))]
        bars = speeds.barh([names[run_dir] for run_dir in group], values, color=colours)
        speeds.bar_label(bars, [f"{v:,.0f}" if v else MISSING for v in values], padding=4, fontsize=9)
        speeds.set(xlabel="tokens/s, all processes", ylabel="", xlim=(0, max(values) * 1.2 or 1))
        speeds.invert_yaxis()
        speeds.grid(axis="y", visible=False)
        speeds.xaxis.set_major_formatter("{x:,.0f}")
    return save_figure(figure, Path(os.path.commonpath([p.resolve() for p in run_dirs])) / "comparison.png")


def plot_evaluation(run_dir: str | Path) -> Path:
    """Draw `plots/eval.png` from `eval.json`: a panel a figure, the base model beside the fine-tuned one."""
    results = read_json(Path(run_dir) / "eval.json")
    base, tuned = results["base"], results["fine_tuned"]
    panels = [(label, key, form) for label, key, form in FIGURES if base.get(key) is not None]
    columns = (len(panels) + 1) // 2
    figure = Figure(figsize=(2.8 * columns, 5.6), dpi=120, layout="constrained")
    figure.suptitle(f"{results['project']}: base and fine-tuned on {results['rows']:,} held-out rows", fontsize=12)
    for axes, (label, key, form) in zip(figure.subplots(2, columns).flat, panels, strict=True):
        values = [base[key], tuned[key]]
        style_axes(axes, label, "", x_label="")
        bars = axes.bar(["base", "fine-tuned"], values, color=COLOURS[:2], width=0.65)
        axes.bar_label(bars, [f"{v:{form}}" for v in values], padding=2, fontsize=10)
        axes.set_ylim(0, max(values) * 1.15 or 1)
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="y", labelsize=8)
        if form.endswith("%"):
            axes.yaxis.set_major_formatter(PercentFormatter(1))
    return save_figure(figure, Path(run_dir) / "plots" / "eval.png")


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


def _labels(run_dirs: list[Path]) -> dict[str, Path]:
    """A short name for each run: its project, with its folder's name where a project has several runs here."""
    projects = [read_summary(p).get("project", p.name) for p in run_dirs]
    names = [p if projects.count(p) == 1 else f"{p}/{d.name}" for p, d in zip(projects, run_dirs, strict=True)]
    unique = len(set(names)) == len(names)
    return dict(zip(names if unique else map(str, run_dirs), run_dirs, strict=True))


def _look(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": LINE_STYLES[number % len(LINE_STYLES)]}


def _xy(points: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(points), list(points.values())


def _new_figure(title: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    style_axes(axes, title, y_label)
    return figure, axes


def style_axes(axes: Axes, title: str, y_label: str, x_label: str = "optimizer step") -> None:
    axes.set_title(title, fontsize=13)
    axes.set_xlabel(x_label, fontsize=11)
    axes.set_ylabel(y_label, fontsize=11)
    axes.tick_params(labelsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    try:
        figure.savefig(partial, format=path.suffix[1:])
        partial.replace(path)  # whole, also on a disk that is full
    finally:
        partial.unlink(missing_ok=True)
    return path


def main() -> None:
    run_dirs = [Path(argument) for argument in sys.argv[1:]]
    if not run_dirs:
        raise UserError("usage: python -m common.report RUN_DIR [RUN_DIR ...]")
    if len(run_dirs) == 1:
        plot_training(run_dirs[0])
        print_summary(run_dirs[0])
    else:
        print_comparison(run_dirs)
        print(f"\nplot: {plot_comparison(run_dirs)}")


if __name__ == "__main__":
    errors.run(main)
