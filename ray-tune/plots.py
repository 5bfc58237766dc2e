"""The two plots of a search: held-out loss by step of every trial, and loss against each hyper-parameter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from trials import Record, Trials, ranking

from common.report import COLOURS, LINE_STYLES, save_figure, style_axes

LOG_FROM = 20  # values that differ by such a factor are drawn on a logarithmic axis


def draw(records: list[Record], trials: Trials, folder: Path) -> None:
    """`search.png` and `search_parameters.png`; nothing where no trial has reported yet."""
    shown = [record for record in ranking(records) if record.curve]
    if shown:
        _curves(shown, trials, folder / "search.png")
        _parameters(shown, folder / "search_parameters.png")


def _curves(records: list[Record], trials: Trials, path: Path) -> None:
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    style_axes(axes, "ray-tune: held-out loss of every trial", "held-out loss (nats a token)")
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
    figure = Figure(figsize=(3.4 * len(names) + 0.6, 3.8), dpi=120, layout="constrained")
    figure.suptitle("ray-tune: last held-out loss against each hyper-parameter", fontsize=12)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        style_axes(axes, "", "last held-out loss" if axes is panels[0] else "", x_label=name)
        for status, mark, colour in (
            ("completed", "o", COLOURS[0]),
            ("stopped", "X", COLOURS[1]),
            ("failed", "P", "#888888"),
            ("", ".", "#888888"),
        ):
            points = [(r.parameters[name], r.last[1]) for r in records if r.status == status]
            if points:
                values = [str(x) if isinstance(x, str) else x for x, _ in points]
                axes.plot(
                    values,
                    [y for _, y in points],
                    mark,
                    color=colour,
                    markersize=9,
                    markeredgecolor="white",
                    label=status or "unfinished",
                )
        best = records[0]
        axes.plot(
            [best.parameters[name]],
            [best.last[1]],
            "o",
            markersize=16,
            markerfacecolor="none",
            color=COLOURS[2],
            label="best",
        )
        numbers = [r.parameters[name] for r in records if isinstance(r.parameters[name], int | float)]
        if numbers and min(numbers) > 0 and max(numbers) / min(numbers) >= LOG_FROM:
            axes.set_xscale("log")
    panels[-1].legend(fontsize=8)
    save_figure(figure, path)
