"""The plots of the READMEs, from the records in `results/`: `python -m tools.figures [--check]`.

Each is an SVG in docs/figures/, on a white ground, so that it is readable on a dark page as well. `--check` changes
nothing and fails, naming the file, if a plot is out of date.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from common import errors
from common.config import REPOSITORY
from common.errors import UserError
from common.plots import COLOURS, style_axes
from tools.results import read

WIDTH, HEIGHT = 7.2, 3.4  # inches: at a README's width, text of 10 points is 12 pixels high


def new_figure(title: str, y_label: str, x_label: str = "") -> tuple[Figure, matplotlib.axes.Axes]:
    """An empty figure at README width in the style of all plots, and its axes."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    style_axes(axes, title, y_label, x_label)
    return figure, axes


def ddp_speed(results: Path) -> Figure:
    """Tokens per second on one GPU, on two, and on two without NVLink."""
    records = read(results / "pytorch-ddp", "speed-1gpu", "speed-2gpu", "speed-2gpu-no-p2p")
    figure, axes = new_figure("pytorch-ddp: what a second GPU gives", "tokens/s, all GPUs")
    speeds = [record["summary"]["tokens_per_second"] for record in records]
    bars = axes.bar([record["label"] for record in records], speeds, color=COLOURS[: len(records)], width=0.6)
    axes.bar_label(bars, [f"{speed:,.0f}\n{speed / speeds[0]:.2f}×" for speed in speeds], padding=3, fontsize=10)
    axes.set_ylim(0, max(speeds) * 1.25)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="x", visible=False)
    return figure


FIGURES: dict[str, Callable[[Path], Figure]] = {"pytorch-ddp-speed": ddp_speed}


def svg(figure: Figure) -> str:
    """The figure as text that is the same each time."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "figures", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def update(repository: Path, check: bool) -> None:
    """Write the figures that changed; with `check`, raise `UserError` if there is one."""
    stale = []
    for name, draw in FIGURES.items():
        path = repository / "docs/figures" / f"{name}.svg"
        new = svg(draw(repository / "results"))
        if not path.is_file() or path.read_text(encoding="utf-8") != new:
            stale.append(str(path.relative_to(repository)))
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(new, encoding="utf-8")
    if stale and check:
        raise UserError(f"out of date: {', '.join(stale)}; bring them up to date with: make format")


if __name__ == "__main__":
    errors.run(lambda: update(REPOSITORY, check="--check" in sys.argv))
