"""The plots of a run and of its evaluation.

Apart from report.py, because matplotlib takes a second to import: a training needs it at its end, and on one rank.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global state, and nothing that looks for a screen
from matplotlib.ticker import PercentFormatter

from common.report import FIGURES, read_json, read_metrics, series

# Okabe and Ito's palette, distinct with every kind of colour blindness: https://jfly.uni-koeln.de/color/
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


LINE_STYLES = ["-", "--", "-.", ":"]


def plot_training(run_dir: str | Path) -> list[Path]:
    """Draw `plots/loss.png`, `learning_rate.png`, `throughput.png` and `memory.png`; the paths of those drawn.

    A figure that the run did not measure (GPU memory on a CPU) is left out, and a plot without any is not drawn.
    """
    metrics, folder, paths = read_metrics(run_dir), Path(run_dir) / "plots", []
    name = read_json(Path(run_dir) / "summary.json").get("project", Path(run_dir).name)
    for file, title, unit, draw in (
        ("loss", "loss", "loss (nats per token)", _draw_loss),
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
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))


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


def plot_evaluation(run_dir: str | Path) -> Path:
    """Draw `plots/eval.png` from `eval.json`: a panel per figure, the base model next to the fine-tuned one."""
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


def look(number: int) -> dict[str, Any]:
    """Colour and line style of the line `number` of a plot."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": LINE_STYLES[number % len(LINE_STYLES)]}


def _xy(points: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(points), list(points.values())


def _new_figure(title: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.5), dpi=150)  # legible at half of a notebook's width
    axes = figure.add_axes((0.16, 0.16, 0.81, 0.74))  # fixed: to find the best margins would take most of a plot's time
    style_axes(axes, title, y_label)
    return figure, axes


def style_axes(axes: Axes, title: str, y_label: str, x_label: str = "optimizer step") -> None:
    """Give the axes the look of all plots: title, labels, a light grid, no frame at the top and right."""
    axes.set_title(title, fontsize=13)
    axes.set_xlabel(x_label, fontsize=11)
    axes.set_ylabel(y_label, fontsize=11)
    axes.tick_params(labelsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the figure atomically, in the format of the path's suffix; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    try:
        figure.savefig(partial, format=path.suffix[1:])
        partial.replace(path)  # whole, also on a disk that is full
    finally:
        partial.unlink(missing_ok=True)
    return path
