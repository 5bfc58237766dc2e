"""The same small task through all seven projects, each by its own launch.sh, and one report.

    make seven                          # what is there: GPUs with SmolLM2, or two CPU processes with a tiny model
    python bench/seven.py --projects pytorch-ddp ray-train
    python bench/seven.py --record      # on a CPU; also results/equality, the README's table and plot

The report is FOLDER/report.md and, in one file with its plots, report.html (FOLDER: runs/seven). Prompts are masked, so
that the processes of a run have unequal numbers of targets. The reference is a plain loop (bench/plain_loop.py). A
project that fails is in the report with its error, and hides no other.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from common import runtime
from common.config import REPOSITORY
from common.plots import COLOURS, save_figure, style_axes
from common.progress import track
from common.report import devices, read_json, read_metrics

STEPS = 30
CONFIG = "pytorch-ddp/smoke.yaml"  # every project's has these keys
COMMON = [
    f"train.max_steps={STEPS}", "train.lr_schedule=constant", "train.warmup_steps=0", f"eval.every={STEPS}",
    "data.eval_rows=64", "checkpoint.every=0", "checkpoint.resume=never", "tracking.backend=none",
]  # fmt: skip
ON_A_CPU = [
    "model.name=tiny:llama", "train.global_batch_size=16", "train.micro_batch_size=4", "train.learning_rate=1e-3",
    "train.precision=fp32",
]  # fmt: skip
ON_GPUS = [
    "model.name=smollm2", "train.global_batch_size=64", "train.micro_batch_size=8", "train.learning_rate=1e-4",
    "data.max_length=256",
]  # fmt: skip
# What starts the processes, what else a project needs (of ray-tune's search, one trial by itself), what it divides.
PROJECTS = {
    "pytorch-ddp": ("torchrun", [], "the batch"),
    "pytorch-fsdp": ("torchrun", [], "the batch; weights, gradients, optimizer state"),
    "deepspeed-offload": ("deepspeed", [], "the batch; gradients and optimizer state, in host memory"),
    "deepspeed-pipeline": ("deepspeed", [], "the layers"),
    "llm-foundry-finetune": ("composer", [], "the batch; weights, gradients, optimizer state"),
    "ray-train": ("ray", [], "the batch; weights, gradients, optimizer state"),
    "ray-tune": ("ray", ["search.trials=1", "search.scheduler=none"], "the trials; each has one GPU"),
}


def train(project: str, settings: list[str], folder: Path) -> dict:
    """One run of the project: its curve of (loss, gradient norm), and what it took. Or its error."""
    run, log = folder / project, folder / f"{project}.log"
    shutil.rmtree(run, ignore_errors=True)
    command = [f"{project}/launch.sh", "--config", "smoke.yaml", *settings, *PROJECTS[project][1], f"output_dir={run}"]
    variables = {} if torch.cuda.is_available() else {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    first_step = None
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | variables, stdout=output, stderr=output)
        while process.poll() is None:
            if first_step is None and any(
                "loss" in step for path in run.rglob("metrics.jsonl") for step in read_metrics(path.parent)
            ):
                first_step = time.perf_counter() - start
            time.sleep(0.1)
    steps = [step for step in read_metrics(run) if "loss" in step]
    result = {
        "curve": [(step["loss"], step["grad_norm"]) for step in steps],
        "summary": read_json(run / "summary.json"),
        "seconds": time.perf_counter() - start,
        "start_up_seconds": first_step,
        # Those of a trial are removed after it.
        "checkpoint_mib": sum(p.stat().st_size for p in run.glob("checkpoints/**/*") if p.is_file()) / 2**20 or None,
    }
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        error = next((line for line in lines if "error:" in line), lines[-1] if lines else "")
        result["error"] = re.sub(r"=/\S*/", "=", error) or f"exit code {process.returncode}"
    return result


def furthest(curve: list, plain: list, which: int) -> float | None:
    """The largest relative distance of a curve from the plain loop's: of losses (0) or of gradient norms (1)."""
    pairs = [(a[which], b[which]) for a, b in zip(curve, plain, strict=False) if a[which] and b[which]]
    return max((abs(a / b - 1) for a, b in pairs), default=None)


def table(record: dict) -> str:
    """One row for each project, in Markdown."""

    def show(value: float | None, form: str, unit: str = "") -> str:
        return f"{value:{form}}{unit}" if value is not None else "–"

    heading = [
        "project", "loss, first", "last", "held out", "furthest from the plain loop", "tokens/s", "peak GPU, GiB",
        "peak host, GiB", "to the first step", "checkpoint, MiB", "train.py, lines", "divides",
    ]  # fmt: skip
    plain = record["plain"]
    rows = [["plain loop", f"{plain[0][0]:.4f}", f"{plain[-1][0]:.4f}", f"{record['plain_held_out']:.4f}"]
            + ["–"] * (len(heading) - 4)]  # fmt: skip
    for project, run in record["runs"].items():
        summary, curve = run["summary"], run["curve"]
        script = REPOSITORY / project / ("trial.py" if project == "ray-tune" else "train.py")
        rows.append([
            f"`{project}`" + (" **failed**" if "error" in run else ""),
            show(curve[0][0] if curve else None, ".4f"),
            show(curve[-1][0] if curve else None, ".4f"),
            show(summary.get("eval_loss_after"), ".4f"),
            show(furthest(curve, plain, 0), ".0e"),
            show(summary.get("tokens_per_second"), ",.0f"),
            show(summary.get("peak_gpu_gib"), ".2f"),
            show(summary.get("peak_host_gib"), ".2f"),
            show(run["start_up_seconds"], ".0f", " s"),
            show(run["checkpoint_mib"], ",.1f"),
            str(len(script.read_text(encoding="utf-8").splitlines())),
            PROJECTS[project][2],
        ])  # fmt: skip
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 2) + ["---"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(record: dict, folder: Path) -> None:
    """curves.png: the losses over each other; losses.png: how far each is from the plain loop's."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    style_axes(axes, "training loss", "loss (nats)")
    steps = range(1, len(record["plain"]) + 1)
    axes.plot(steps, [loss for loss, _ in record["plain"]], color="#bbbbbb", linewidth=6, label="plain loop")
    for (project, run), colour in zip(record["runs"].items(), COLOURS, strict=False):
        curve = [loss for loss, _ in run["curve"]]
        axes.plot(range(1, len(curve) + 1), curve, color=colour, linewidth=1.2, label=project)
    axes.legend(fontsize=8, ncol=2)
    save_figure(figure, folder / "curves.png")

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    style_axes(axes, "distance of each project's loss from the plain loop's", "relative difference (at least 1e-9)")
    for (project, run), colour in zip(record["runs"].items(), COLOURS, strict=False):
        differences = [abs(a[0] / b[0] - 1) for a, b in zip(run["curve"], record["plain"], strict=False)]
        axes.plot(range(1, len(differences) + 1), [max(d, 1e-9) for d in differences], color=colour, label=project,
                  marker=".")  # fmt: skip
    axes.axhline(1e-4, color="black", linestyle="--", linewidth=1, label="bound of the tests, fp32")
    axes.set(yscale="log", ylim=(5e-10, 1e-1))
    axes.legend(fontsize=8, ncol=2)
    save_figure(figure, folder / "losses.png")


def write_report(record: dict, folder: Path) -> None:
    """report.md next to its plots, and report.html with the plots in it."""
    environment, settings = record["environment"], record["settings"]
    failed = [f"- `{project}`: {run['error']} (all of it: `{project}.log`)" for project, run in record["runs"].items()
              if "error" in run]  # fmt: skip
    parts = [
        "# The same task, seven ways",
        f"{settings['model.name']} learns to explain Python's standard library, {settings['train.max_steps']} steps of "
        f"{settings['train.global_batch_size']} sequences, {environment['precision'].partition(':')[0]}; "
        f"{devices(environment)}, torch {environment['versions']['torch']}, {record['date']}, "
        f"commit {(environment['git_commit'] or 'unknown')[:10]}.",
        *(["## Failed", "\n".join(failed)] if failed else []),
        table(record),
        "The plain loop is one process: transformers' own loss and torch's AdamW. Distances are relative, over all "
        "steps. `ray-tune`'s lines are those of `trial.py`, its training loop. So few steps say little about the "
        "speed of long runs: that is in the projects' READMEs.",
        "![Training losses over each other](curves.png)",
        "![Distance of each project's loss from the plain loop's](losses.png)",
    ]
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    for name in ("curves.png", "losses.png"):
        image = base64.b64encode((folder / name).read_bytes()).decode()
        text = text.replace(f"]({name})", f"](data:image/png;base64,{image})")
    markdown = MarkdownIt().enable("table")
    markdown.validateLink = lambda url: True  # it refuses images in the page itself
    style = ("body{font:16px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
             "table{border-collapse:collapse;font-size:13px}"
             "td,th{border:1px solid #ccc;padding:4px 8px}img{max-width:100%}")  # fmt: skip
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Seven ways</title><style>{style}</style>'
    (folder / "report.html").write_text(page + markdown.render(text) + "</html>\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--projects", nargs="*", choices=PROJECTS, default=list(PROJECTS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more settings, of every run")
    parser.add_argument("--record", action="store_true", help="write results/equality too")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs/seven")
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    if arguments.record and (gpus or len(arguments.projects) < len(PROJECTS) or arguments.set):
        parser.error("--record is of all projects on a CPU, as they are: leave out --projects and --set")
    settings = [*COMMON, *(ON_GPUS if gpus else ON_A_CPU), *arguments.set]
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    # The plain loop in a process of its own: the projects' processes find the GPU empty.
    output = folder / "plain.json"
    command = [sys.executable, "bench/plain_loop.py", CONFIG, "42", str(output), *settings]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": path}, check=True)
    plain = read_json(output)
    precision = plain["environment"]["precision"]
    record = {
        "date": datetime.date.today().isoformat(),
        "environment": runtime.describe_environment(gpus or 2, precision),
        "settings": dict(setting.split("=", 1) for setting in settings),
        "plain": [*zip(plain["losses"], plain["grad_norms"], strict=True)],
        "plain_held_out": plain["eval_loss_after"],
        "runs": {},
    }
    for project in track(arguments.projects, "Projects", "project", len(arguments.projects)):
        record["runs"][project] = train(project, settings, folder)
        draw(record, folder)
        write_report(record, folder)  # as far as it is: an interrupted call leaves a report
    failed = [project for project, run in record["runs"].items() if "error" in run]
    for project, run in record["runs"].items():
        curve, distance = run["curve"], furthest(run["curve"], record["plain"], 0)
        result = (
            f"failed: {run['error']}"
            if "error" in run
            else (f"loss {curve[0][0]:.4f} → {curve[-1][0]:.4f}, at most {distance:.0e} from the plain loop")
        )
        print(f"{project:22} {result}  ({run['seconds']:.0f} s)")
    print(f"\nin {folder}:\n  report.html  report.md  and each run's folder and log")
    if arguments.record and not failed:
        published = {k: record[k] for k in ("date", "environment", "settings", "plain")}
        published["launchers"] = {project: launcher for project, (launcher, _, _) in PROJECTS.items()}
        published["projects"] = {project: run["curve"] for project, run in record["runs"].items()}
        results = REPOSITORY / "results/equality"
        (results / "losses.json").write_text(json.dumps(published, indent=1) + "\n", encoding="utf-8")
        shutil.copy(folder / "losses.png", results)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
