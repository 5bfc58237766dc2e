"""The two plots of a search: held-out loss by step of every trial, and loss against each hyper-parameter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from trials import Record, Trials, ranking

from common.plots import COLOURS, LINE_STYLES, save_figure, style_axes

LOG_FROM = 5  # values that differ by such a factor are drawn on a logarithmic axis


def draw(records: list[Record], trials: Trials, folder: Path) -> None:
    """`search.png` and `search_parameters.png`; nothing if no trial has reported yet."""
    shown = [record for record in ranking(records) if record.curve]
    if shown:
        _curves(shown, trials, folder / "search.png")
        _parameters(shown, folder / "search_parameters.png")


def _curves(records: list[Record], trials: Trials, path: Path) -> None:
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    style_axes(axes, "ray-tune: held-out loss of every trial", "held-out loss (nats per token)")
    for rung in trials.rungs:
        axes.axvline(rung, color="#bbbbbb", linestyle=":", linewidth=1, zorder=0)
    for i, record in enumerate(records):
        colour, line = COLOURS[i % len(COLOURS)], LINE_STYLES[i // len(COLOURS) % len(LINE_STYLES)]
        steps, losses = list(record.curve), list(record.curve.values())
        label = f"{record.name}, {record.status or 'unfinished'}"
        axes.plot(steps, losses, color=colour, linestyle=line, marker=".", linewidth=2 if i == 0 else 1.2, label=label)
        if record.status in ("stopped", "failed"):
            mark = "X" if record.status == "stopped" else "P"
            axes.plot(steps[-1], losses[-1], mark, color=colour, markersize=10, markeredgecolor="white")
    # A trial that diverges would press all others into one line.
    usual = np.array([loss for record in records for loss in record.curve.values()])
    low, high = usual.min(), np.percentile(usual, 95)
    if usual.max() > high + 2 * (high - low) > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.3 * (high - low))
    axes.legend(fontsize=8, title="best first; ✕ stopped early, + failed; dotted: rungs", title_fontsize=8)
    save_figure(figure, path)


def _parameters(records: list[Record], path: Path) -> None:
    names = list(records[0].parameters)
    reached = set.intersection(*(set(record.curve) for record in records))
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4 * columns + 1, 2.9 * rows + 0.6), dpi=120, layout="constrained")
    figure.suptitle("ray-tune: held-out loss against each hyper-parameter", fontsize=12)
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for spare in panels[len(names) :]:
        spare.remove()
    groups = [
        (f"all, at step {max(reached)}", "X", COLOURS[1], [(r, r.curve[max(reached)]) for r in records])
        if reached
        else ("last", "X", COLOURS[1], [(r, r.last[1]) for r in records]),
        ("at the full budget", "o", COLOURS[0], [(r, r.last[1]) for r in records if r.status == "completed"]),
        ("best", "o", COLOURS[2], [(records[0], records[0].last[1])]),
    ]
    for number, (axes, name) in enumerate(zip(panels, names, strict=False)):
        style_axes(axes, "", "" if number % columns else "held-out loss (nats per token)", x_label=name)
        for label, mark, colour, points in groups:
            values = [r.parameters[name] for r, _ in points]
            ring = {"markersize": 16, "markerfacecolor": "none"} if label == "best" else {"markersize": 9}
            axes.plot(values, [loss for _, loss in points], mark, color=colour, label=label, **ring)
        values = [r.parameters[name] for r in records]
        if not isinstance(values[0], str) and min(values) > 0 and max(values) / min(values) >= LOG_FROM:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(groups), fontsize=9)
    save_figure(figure, path)
