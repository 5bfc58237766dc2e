"""The plots of the READMEs, from the records in `results/`: `python -m tools.figures [--check]`.

Each is an SVG in docs/figures/, on a white ground, so that it is readable on a dark page as well. `--check` changes
nothing and fails, naming the file, if a plot is out of date.
"""

from __future__ import annotations

import io
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from common import errors
from common.config import REPOSITORY
from common.errors import UserError
from common.plots import COLOURS, style_axes
from tools.results import read

WIDTH, HEIGHT = 7.2, 3.4  # inches: at a README's width, text of 10 points is 12 pixels high


def new_figure(title: str, y_label: str, x_label: str = "") -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    style_axes(axes, title, y_label, x_label)
    return figure, axes


def ddp_speed(results: Path) -> Figure:
    """Tokens per second on one GPU, on two, and on two without NVLink."""
    records = read(results / "pytorch-ddp", "speed-1gpu", "speed-2gpu", "speed-2gpu-no-p2p")
    figure, axes = new_figure("pytorch-ddp: what a second GPU gives", "tokens/s, all GPUs")
    speeds = [record["summary"]["tokens_per_second"] for record in records]
    labels = [textwrap.fill(record["label"], 24) for record in records]
    bars = axes.bar(labels, speeds, color=COLOURS[: len(records)], width=0.6)
    axes.bar_label(bars, [f"{speed:,.0f}\n{speed / speeds[0]:.2f}×" for speed in speeds], padding=3, fontsize=10)
    axes.set_ylim(0, max(speeds) * 1.25)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="x", visible=False)
    return figure


def fsdp_memory(results: Path) -> Figure:
    """Peak memory of each GPU under a T4's limit; a run that does not fit reaches the limit."""
    names = ("ddp", "micro-1", "micro-4", "micro-8", "micro-4-no-sync", "offload")
    records = read(results / "pytorch-fsdp", *(f"memory-{name}" for name in names))
    figure, axes = new_figure("pytorch-fsdp: OPT-1.3B in 14.7 GiB per GPU", "", "peak GiB on each of two GPUs")
    limit = float(records[0]["settings"]["runtime.gpu_memory_limit_gib"])
    for place, record in enumerate(records):
        peak = record["summary"].get("peak_gpu_gib")
        failed = {"facecolor": "white", "edgecolor": COLOURS[1], "hatch": "//"}
        axes.barh(place, peak or limit, 0.6, **({"color": COLOURS[0]} if peak else failed))
        text = {"color": "white", "ha": "right"} if peak else {"backgroundcolor": "white", "ha": "center"}
        x = peak - 0.2 if peak else limit / 2
        axes.text(x, place, f"{peak:.1f}" if peak else "out of memory", va="center", **text)
    axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(records)), [record["label"].replace("`", "") for record in records])
    axes.set_xlim(0, limit * 1.05)
    axes.xaxis.set_major_locator(MultipleLocator(2))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


def offload_host_memory(results: Path) -> Figure:
    """What the host's memory is for, by the preflight, and the peak that was measured."""
    records = read(results / "deepspeed-offload", "host-16-deepspeed", "512-micro-16", "1024-micro-16", "two-gpus")
    figure, axes = new_figure("deepspeed-offload: host memory, Llama-3.2-1B", "", "GiB of the whole process tree")
    parts = {  # in the preflight's words, by purpose
        "fp32 masters": ["masters"],
        "Adam's moments": ["moments"],
        "gradients and new weights": ["gradients and new weights", "gradients", "new weights"],
        "Python, libraries, CUDA": ["processes"],
    }
    ends = [0.0] * len(records)
    plans = [record["environment"]["memory_plan"]["host"]["parts_gib"] for record in records]
    for (label, names), colour in zip(parts.items(), (COLOURS[0], COLOURS[2], COLOURS[4], "#bbbbbb"), strict=True):
        sizes = [sum(plan.get(name, 0) for name in names) for plan in plans]
        axes.barh(range(len(records)), sizes, 0.55, left=ends, label=label, color=colour)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    peaks = [record["summary"]["peak_host_gib"] for record in records]
    axes.plot(peaks, range(len(records)), "D", color="black", label="measured peak", markersize=7)
    for place, (peak, end) in enumerate(zip(peaks, ends, strict=True)):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the dashed line stays behind
        axes.text(max(peak, end) + 0.7, place, f"{peak:.1f}", va="center", bbox=box)
    kaggle = 30e9 / 2**30
    axes.axvline(kaggle, color="black", linestyle="--", linewidth=1)
    axes.annotate("30 GB", (kaggle, -0.62), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(records)), [textwrap.fill(record["label"], 22) for record in records])
    axes.set_ylim(len(records) - 0.5, -0.8)
    axes.set_xlim(0, kaggle * 1.12)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def pipeline_efficiency(results: Path) -> Figure:
    """The share of a step in which the slowest stage computes, beside what the bubble allows."""
    counts = (2, 4, 8, 16, 32)
    records = read(results / "deepspeed-pipeline", *(f"2-stages-micro-{m}" for m in counts))
    (four,) = read(results / "deepspeed-pipeline", "4-stages")
    figure, axes = new_figure(
        "deepspeed-pipeline: computing instead of waiting",
        "computing, of a step's time",
        "micro-batches per step, m",
    )
    for stages, colour in ((2, COLOURS[0]), (4, COLOURS[1])):
        ideal = [m / (m + stages - 1) for m in counts]
        label = f"{stages} stages, the schedule's limit m / (m + {stages - 1})"
        axes.plot(counts, ideal, "--", color=colour, linewidth=1.5, label=label)
    measured = [record["efficiency"] for record in records]
    axes.plot(counts, measured, "o-", color=COLOURS[0], linewidth=2, markersize=7, label="2 stages, measured")
    axes.plot(16, four["efficiency"], "s", color=COLOURS[1], markersize=8, label="4 stages, measured")
    for x, y in [*zip(counts, measured, strict=True), (16, four["efficiency"])]:
        axes.annotate(f"{y:.0%}", (x, y), (0, 8), textcoords="offset points", ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(m) for m in counts])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(0.2, 1.02)
    axes.legend(loc="lower right")
    return figure


FIGURES: dict[str, Callable[[Path], Figure]] = {
    "pytorch-ddp-speed": ddp_speed,
    "pytorch-fsdp-memory": fsdp_memory,
    "deepspeed-offload-host-memory": offload_host_memory,
    "deepspeed-pipeline-efficiency": pipeline_efficiency,
}


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
