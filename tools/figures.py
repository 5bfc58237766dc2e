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
from tools.results import read, speed

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
    speeds = [speed(record) for record in records]
    labels = [textwrap.fill(record["label"], 24) for record in records]
    bars = axes.bar(labels, speeds, color=COLOURS[: len(records)], width=0.6)
    axes.bar_label(bars, [f"{value:,.0f}\n{value / speeds[0]:.2f}×" for value in speeds], padding=3, fontsize=10)
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
    """The share of a step in which the slowest stage computes, next to what the bubble allows."""
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


def foundry_step(results: Path) -> Figure:
    """Where a step's seconds go, LLM Foundry's and pytorch-fsdp's."""
    records = read(results / "llm-foundry-finetune", "profile-fsdp", "profile")
    figure, axes = new_figure("llm-foundry-finetune: where a step goes", "", "seconds per step")
    figure.set_figheight(2.6)
    names = [record["label"].replace("`", "") for record in records]
    left = [0.0] * len(records)
    for (part, label), colour in zip(
        (("exchange", "collectives"), ("only_compute", "compute alone"), ("idle", "GPU idle")), COLOURS, strict=False
    ):
        widths = [record["step-profile"][part] for record in records]
        axes.barh(names, widths, left=left, color=colour, height=0.55, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, record in enumerate(records):
        text = f"{left[i]:.2f} s\nidle {record['step-profile']['idle']:.2f}"
        axes.text(left[i] + 0.03, i, text, va="center", fontsize=10)
    axes.set_xlim(0, max(left) * 1.18)
    axes.grid(axis="y", visible=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    return figure


def ray_train_memory(results: Path) -> Figure:
    """The peak of each GPU's memory by the number of workers that share the state."""
    records = read(results / "ray-train", "1gpu-micro-4", "2gpu-micro-4", "4gpu-micro-4")
    limit = float(records[1]["settings"]["runtime.gpu_memory_limit_gib"])
    figure, axes = new_figure("ray-train: ZeRO-3 divides the state", "peak GiB on each GPU")
    peaks = [record["summary"]["peak_gpu_gib"] for record in records]
    names = [f"{record['gpus']} worker{'s' if record['gpus'] > 1 else ''}" for record in records]
    bars = axes.bar(names, peaks, color=COLOURS[0], width=0.55)
    axes.bar_label(bars, [f"{peak:.1f}" for peak in peaks], padding=3, fontsize=11)
    axes.axhline(limit, color=COLOURS[1], linestyle="--", linewidth=1.5)
    axes.text(2.45, limit + 0.4, f"a T4 has {limit:g} GiB", color=COLOURS[1], ha="right", fontsize=11)
    axes.set_xlim(-0.5, 2.5)
    axes.set_ylim(0, max(peaks) * 1.15)
    axes.set_yticks(range(0, 21, 5))
    axes.grid(axis="x", visible=False)
    return figure


def tune_search(results: Path) -> Figure:
    """A search with early stopping: what its trials trained, and what they would have come to."""
    (record,) = read(results / "ray-tune", "early-stopping")
    real = record["searches"][0]
    trials = record["draws"]["smoke.yaml"][record["seeds"].index(real["seed"])][: real["trials"]]
    budget, best = record["budget"], int(real["best"].removeprefix("trial-"))
    stopped = sum(ended < budget for ended in real["steps"])
    title = f"ray-tune: {stopped} of {real['trials']} trials are stopped early"
    figure, axes = new_figure(title, "held-out loss", "optimizer step")
    figure.set_figheight(4.2)
    interval = budget // len(trials[0]["losses"])  # between two evaluations
    rung = real["grace_period"]
    while rung < budget:
        axes.axvline(rung, color="#888888", linestyle=":", linewidth=1.2)
        axes.text(rung + 3, 7.28, f"rung at {rung}", fontsize=10, color="#555555")
        rung *= real["reduction_factor"]
    for number, (trial, ended) in enumerate(zip(trials, real["steps"], strict=True)):
        losses = dict(zip(range(interval, budget + 1, interval), trial["losses"], strict=True))
        trained = {step: loss for step, loss in losses.items() if step <= ended}
        colour = COLOURS[0] if number == best else COLOURS[-1] if number == 0 else "#888888"
        axes.plot(list(losses), list(losses.values()), color="#cccccc", linewidth=1, zorder=1)
        axes.plot(list(trained), list(trained.values()), color=colour, linewidth=2, zorder=2)
        if ended < budget:
            axes.plot(ended, losses[ended], "X", color=COLOURS[1], markersize=9, markeredgecolor="white", zorder=3)
        elif number in (0, best):
            name = "the default" if number == 0 else f"{real['best']}, the best"
            axes.text(
                budget + 6, losses[budget], f"{losses[budget]:.2f}\n{name}", color=colour, va="center", fontsize=10
            )
    axes.set_xlim(0, budget * 1.22)
    axes.set_ylim(5.2, 7.4)
    axes.set_xticks(range(0, budget + 1, 50))
    return figure


def tune_parameters(results: Path) -> Figure:
    """The same search: each hyperparameter against the loss at the first rung and at the end."""
    (record,) = read(results / "ray-tune", "early-stopping")
    real = record["searches"][0]
    trials = record["draws"]["smoke.yaml"][record["seeds"].index(real["seed"])][: real["trials"]]
    names = ["learning_rate", "weight_decay", "warmup_steps", "micro_batch_size"]
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    figure.suptitle("ray-tune: loss against each hyperparameter", fontsize=13)
    whole = [i for i, steps in enumerate(real["steps"]) if steps == record["budget"]]
    for axes, name in zip(figure.subplots(2, 2, sharey=True).flat, names, strict=True):
        style_axes(axes, "", "", name)
        axes.plot([t[name] for t in trials], [t["losses"][0] for t in trials], "X", color=COLOURS[1], markersize=8,
                  label=f"all trials, at step {real['grace_period']}")  # fmt: skip
        axes.plot([trials[i][name] for i in whole], [trials[i]["losses"][-1] for i in whole], "o", color=COLOURS[0],
                  markersize=8, label=f"those that got all {record['budget']} steps")  # fmt: skip
        if name == "learning_rate":
            axes.set_xscale("log")
    figure.supylabel("held-out loss", fontsize=11)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=10, frameon=False)
    return figure


def tune_early_stopping(results: Path) -> Figure:
    """What early stopping takes and finds, by the first rung and the number of trials, over the draws."""
    (record,) = read(results / "ray-tune", "early-stopping")
    reduction, draws = record["searches"][0]["reduction_factor"], len(record["seeds"])
    titles = {"smoke.yaml": "warm-ups end before the first rung", "warm-ups up to 40 steps": "warm-ups up to step 40"}
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (space, rows) in zip(panels, record["replays"].items(), strict=True):
        style_axes(axes, "", "", "")
        axes.set_title(titles[space], fontsize=12)
        rows = [row for row in rows if row["reduction_factor"] == reduction]
        for colour, mark, number in zip(COLOURS, "os^", sorted({row["trials"] for row in rows}), strict=False):
            ours = [row["ours"] for row in rows if row["trials"] == number]  # by first rung
            axes.plot(
                [o["share"] for o in ours],
                [o["best_found"] for o in ours],
                marker=mark,
                color=colour,
                linewidth=1,
                markersize=8,
                label=f"{number} trials",
            )
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlim(0.35, 0.7)
        axes.set_ylim(0, draws + 0.6)
        axes.set_yticks(range(0, draws + 1, 3))
    figure.supxlabel("optimizer steps taken, of those without early stopping", fontsize=11)
    panels[0].set_ylabel(f"best trial found, of {draws} draws", fontsize=11)
    panels[1].legend(loc="lower right", fontsize=10)
    return figure


FIGURES: dict[str, Callable[[Path], Figure]] = {
    "pytorch-ddp-speed": ddp_speed,
    "pytorch-fsdp-memory": fsdp_memory,
    "deepspeed-offload-host-memory": offload_host_memory,
    "deepspeed-pipeline-efficiency": pipeline_efficiency,
    "llm-foundry-finetune-step": foundry_step,
    "ray-train-memory": ray_train_memory,
    "ray-tune-early-stopping": tune_early_stopping,
    "ray-tune-parameters": tune_parameters,
    "ray-tune-search": tune_search,
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
