"""One real model, the same rows, seed, batch and schedule, through the real launchers of all seven projects.

    python bench/real.py --data-dir FOLDER                       # three tasks, bf16 and fp16; two GPUs
    python bench/real.py --data-dir FOLDER --tasks gsm8k --precisions bf16 --projects pytorch-ddp plain
    python bench/real.py --data-dir FOLDER --jobs 5 --minutes 9  # five runs at a time; again later for what is left
    python bench/real.py --data-dir FOLDER --tasks abstracts --projects 'pytorch-ddp killed' 'ray-train killed'
    python bench/real.py --draw                                  # the plot, from the records that are there

FOLDER holds arxiv-abstracts.jsonl (a line: {"text": …}) and gsm8k-train.jsonl ({"prompt": …, "response": …}). The tasks
are bench/tasks/*.yaml. For each task and precision, results/real/TASK-PRECISION.json gets every project's losses, its
held-out loss before and after, and its eval.py's figures and samples; and the same of a plain loop with five orders of
the training rows (bench/plain_loop.py), whose spread is what chance does. A run that fails is recorded with its error.
Runs that a record has already are kept, unless they failed or --again is given.

`PROJECT killed`: all its processes get SIGKILL in the middle; the same command then resumes from the last checkpoint.

ray-tune runs a search of two learning rates, of which it trains the best; LLM Foundry has one of the three formats, and
takes its own environment (.venv-foundry).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import yaml
from matplotlib.figure import Figure

from common.config import REPOSITORY
from common.plots import COLOURS, LINE_STYLES, save_figure, smoothed, style_axes
from common.report import read_json, read_metrics
from tools.results import KILLED, PLAIN, band

RESULTS = REPOSITORY / "results/real"
TASKS = {"abstracts": "arxiv-abstracts.jsonl", "gsm8k": "gsm8k-train.jsonl", "messages": "gsm8k-train.jsonl"}
# The settings that a project needs in addition to the task's.
PROJECTS: dict[str, list[str]] = {
    "pytorch-ddp": [],
    "pytorch-fsdp": [],
    "deepspeed-offload": [],
    "deepspeed-pipeline": [],
    "llm-foundry-finetune": [],
    "ray-train": [],
    "ray-tune": ["search.trials=2", "search.scheduler=none"],
}
SEEDS = ("42", "1", "2", "3", "4")  # the first is the projects' own: the same rows in the same order
KILL_AT, CHECKPOINT_EVERY = 30, 12  # steps
SAMPLES, CHARACTERS = 2, 600  # kept in a record, and of each text


@dataclass
class Bench:
    """What all runs of a call share."""

    data: Path
    scratch: Path
    logs: Path
    settings: list[str]  # the command line's, after the task's and the project's
    end: float  # time.monotonic() when running processes are ended

    def __post_init__(self) -> None:
        self.lock = threading.Lock()  # of the records
        self.gpus = itertools.cycle(range(torch.cuda.device_count()) or [None])

    def one_gpu(self) -> dict[str, str]:
        """The environment of a run on one GPU: each in turn."""
        with self.lock:
            gpu = next(self.gpus)
        return {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}


def task_file(task: str) -> Path:
    return Path("bench/tasks") / f"{task}.yaml"


def data_file(bench: Bench, task: str) -> Path:
    """The task's rows. Those of `messages` are written here, from the same problems."""
    source = bench.data / TASKS[task]
    if task != "messages":
        return source
    path = bench.scratch / "messages.jsonl"
    with bench.lock:
        if not path.exists():
            # Not splitlines(): a text may hold U+2028, which ends no line of JSON.
            rows = [json.loads(line) for line in source.read_text(encoding="utf-8").strip().split("\n")]
            turns = ((("user", row["prompt"]), ("assistant", row["response"])) for row in rows)
            lines = (json.dumps({"messages": [{"role": r, "content": c} for r, c in turn]}) + "\n" for turn in turns)
            path.write_text("".join(lines), encoding="utf-8")
    return path


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL `process` and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait()


def execute(
    bench: Bench, command: list[str], log: Path, variables: dict[str, str], enough: Callable[[], bool] = lambda: False
) -> str:
    """Run `command` in the repository; what went wrong, in one line, or nothing.

    It and all that it started are killed when the call's time is over: then `TimeoutError`; or as soon as `enough()`.
    """
    if time.monotonic() > bench.end:
        raise TimeoutError
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path} | variables
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)
        while (code := process.poll()) is None:
            if time.monotonic() > bench.end:
                kill_all(process)
                raise TimeoutError
            if enough():
                kill_all(process)
                return "killed"
            time.sleep(0.2)
    if code == 0:
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    error = next((line for line in lines if "error:" in line), f"exit code {code}: {lines[-1]}")
    return re.sub(r"=/\S*/", "=", error)  # a record names no folder of the machine


def run_plain(bench: Bench, task: str, precision: str, seed: str, folder: Path, log: Path) -> dict:
    """One run of the plain loop, in a process of its own on one GPU."""
    output = folder / "plain.json"
    settings = [f"data.name={data_file(bench, task)}", f"train.precision={precision}", *bench.settings]
    command = [sys.executable, "bench/plain_loop.py", str(task_file(task)), seed, str(output), *settings]
    error = execute(bench, command, log, bench.one_gpu())
    return {"status": "failed", "error": error} if error else {"status": "completed", **read_json(output)}


def run_project(bench: Bench, task: str, precision: str, name: str, folder: Path, log: Path) -> dict:
    """A run of the project's launch.sh, killed and restarted if `name` asks for it, then of its eval.py on one GPU."""
    project = name.removesuffix(KILLED)
    settings = [f"data.name={data_file(bench, task)}", f"train.precision={precision}", *PROJECTS[project]]
    if project == "ray-tune":  # the task's own rate, which is the first trial, and a tenth of it
        rate = yaml.safe_load((REPOSITORY / task_file(task)).read_text(encoding="utf-8"))["train"]["learning_rate"]
        settings.append(f"search.space={{learning_rate: {{choice: [{rate / 10}, {rate}]}}}}")
    settings += bench.settings
    if name != project:
        settings.append(f"checkpoint.every={CHECKPOINT_EVERY}")
    command = [f"{project}/launch.sh", "--config", str(task_file(task)), *settings]
    run = folder / "run"
    entry = {"command": shlex.join(re.sub(r"=/.*/", "=", part) for part in command)}
    if name != project:

        def in_the_middle() -> bool:
            return any(step["step"] >= KILL_AT for step in read_metrics(run))

        if error := execute(bench, [*command, f"output_dir={run}"], log, {}, in_the_middle).replace("killed", ""):
            return entry | {"status": "failed", "error": error}
        entry["killed_at"] = max(step["step"] for step in read_metrics(run))
    error = execute(bench, [*command, f"output_dir={run}"], log, {})
    steps = [step for step in read_metrics(run) if "loss" in step]
    entry |= {
        "losses": [round(step["loss"], 6) for step in steps],
        "skipped": [step["step"] for step in steps if step["grad_norm"] is None],  # by the loss scaler, fp16
        "environment": read_json(run / "environment.json"),
    }
    if error:
        return entry | {"status": "failed", "error": error}
    summary = read_json(run / "summary.json")
    kept = ("status", "eval_loss_before", "eval_loss_after", "peak_gpu_gib", "peak_host_gib", "seconds", "search")
    entry |= {key: summary[key] for key in kept if key in summary}

    own = REPOSITORY / ".venv-foundry/bin/python"
    python = str(own) if project == "llm-foundry-finetune" else sys.executable
    evaluate = [python, f"{project}/eval.py", "--config", str(run / "config.yaml"), f"output_dir={run}"]
    if error := execute(bench, evaluate, log, bench.one_gpu()):
        return entry | {"evaluation_error": error}
    results = read_json(run / "eval.json")
    samples = [{k: text[:CHARACTERS] for k, text in sample.items()} for sample in results["samples"][:SAMPLES]]
    return entry | {"evaluation": {k: results[k] for k in ("base", "fine_tuned", "rows")}, "samples": samples}


def unsupported(task: str, project: str) -> str:
    """Why a project does not have this task; empty if it has."""
    form = yaml.safe_load((REPOSITORY / task_file(task)).read_text(encoding="utf-8"))["data"]["format"]
    if project == "llm-foundry-finetune" and form != "prompt-response":
        return f"LLM Foundry's loader takes prompts and responses, not data.format={form}"
    return ""


def load_record(path: Path, bench: Bench, task: str, precision: str) -> dict:
    """The record so far, or a new one if other settings or rows made it."""
    settings = yaml.safe_load((REPOSITORY / task_file(task)).read_text(encoding="utf-8"))
    what = {
        "task": task,
        "precision": precision,
        "settings": settings,
        "more_settings": bench.settings,
        "data": {"file": TASKS[task], "sha256": hashlib.sha256((bench.data / TASKS[task]).read_bytes()).hexdigest()},
    }
    record = read_json(path)
    return record if what.items() <= record.items() else what | {"plain": {}, "projects": {}}


def run_one(bench: Bench, results: Path, task: str, precision: str, name: str, at_a_time: int) -> None:
    """One run, into its record. `name` is a project, or `plain` and a seed."""
    seed = name.removeprefix("plain ") if name.startswith("plain ") else ""
    label = f"{task}-{precision} {name}"
    log = bench.logs / f"{label.replace(' ', '-')}.log"
    log.unlink(missing_ok=True)
    folder = Path(tempfile.mkdtemp(dir=bench.scratch))
    start = time.perf_counter()
    try:
        if reason := unsupported(task, name.removesuffix(KILLED)):
            entry = {"status": "not offered", "error": reason}
        elif seed:
            entry = run_plain(bench, task, precision, seed, folder, log)
        else:
            entry = run_project(bench, task, precision, name, folder, log)
    except TimeoutError:
        print(f"{label:40} not finished in time; the next call takes it", flush=True)
        return
    except Exception as error:  # of this program or of a file that a run left half written: the other runs count
        entry = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wall = round(time.perf_counter() - start, 1)
    entry |= {"date": datetime.date.today().isoformat(), "wall_seconds": wall, "at_a_time": at_a_time}
    path = results / f"{task}-{precision}.json"
    with bench.lock:
        record = load_record(path, bench, task, precision)
        record["plain" if seed else "projects"][seed or name] = entry
        partial = path.with_suffix(".writing")
        partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
    losses = [f"{entry[key]:.4f}" if entry.get(key) else "–" for key in ("eval_loss_before", "eval_loss_after")]
    problem = entry.get("error") or entry.get("evaluation_error") or ""
    print(f"{label:40} {entry['status']:12} {' → '.join(losses)}  {wall:.0f} s  {problem}", flush=True)


def curves(record: dict) -> Iterator[tuple[str, list[float]]]:
    for name, entry in record["projects"].items():
        if entry.get("losses") and not name.endswith(KILLED):
            yield name, smoothed(entry["losses"])


def draw(results: Path) -> None:
    """losses.png: a panel for each record; every project's training loss, smoothed, over the band of the plain loop."""
    records = [read_json(path) for path in sorted(results.glob("*.json"))]
    if not records:
        return
    tasks = list(dict.fromkeys(r["task"] for r in records))
    precisions = list(dict.fromkeys(r["precision"] for r in records))
    figure = Figure(figsize=(5 * len(tasks), 3.6 * len(precisions)), dpi=120, layout="constrained")
    panels = figure.subplots(len(precisions), len(tasks), squeeze=False)
    for axes in panels.flat:
        axes.set_visible(False)  # unless there is a record for it
    for record in records:
        axes = panels[precisions.index(record["precision"])][tasks.index(record["task"])]
        axes.set_visible(True)
        style_axes(axes, f"{record['task']}, {record['precision']}", "training loss, smoothed")
        plain = [smoothed(run["losses"]) for run in record["plain"].values() if run.get("losses")]
        if plain:
            steps = range(1, min(map(len, plain)) + 1)
            lowest, highest = ([f(values) for values in zip(*plain, strict=False)] for f in (min, max))
            axes.fill_between(
                steps, lowest, highest, color="#bbbbbb", label=f"{PLAIN}: {len(plain)} orders of the rows"
            )
        for name, values in sorted(curves(record), key=lambda curve: list(PROJECTS).index(curve[0])):
            i = list(PROJECTS).index(name)  # one look in all panels
            look = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINE_STYLES[i % len(LINE_STYLES)]}
            axes.plot(range(1, len(values) + 1), values, label=name, linewidth=1.2, **look)
    handles = {h.get_label(): h for axes in panels.flat for h in axes.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=9)
    print(f"plot: {save_figure(figure, results / 'losses.png')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="the folder with the two files")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--precisions", nargs="*", choices=("bf16", "fp16", "fp32"), default=["bf16", "fp16"])
    names = ["plain", *PROJECTS, *(project + KILLED for project in PROJECTS)]
    parser.add_argument(
        "--projects", nargs="*", choices=names, default=["plain", *PROJECTS], help="plain: the plain loop's seeds"
    )
    parser.add_argument("--steps", type=int, help="train.max_steps of every run, instead of the tasks' epochs")
    parser.add_argument("--model", help="model.name, instead of smollm2: for a trial of this program")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more settings, of every run")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time; they slow each other down")
    parser.add_argument("--minutes", type=float, default=1e6, help="end after so long; the records are whole")
    parser.add_argument("--again", action="store_true", help="also what the records have already")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what each run prints there")
    parser.add_argument("--draw", action="store_true", help="the plot only")
    arguments = parser.parse_args()
    arguments.results = arguments.results.resolve()
    if arguments.draw:
        return draw(arguments.results)
    if arguments.data_dir is None:
        parser.error("--data-dir: name the folder with " + " and ".join(sorted(set(TASKS.values()))))
    if missing := [name for name in set(map(TASKS.get, arguments.tasks)) if not (arguments.data_dir / name).is_file()]:
        parser.error(f"--data-dir {arguments.data_dir}: no {missing[0]} in it")
    more = [f"train.max_steps={arguments.steps}"] if arguments.steps else []
    more += [f"model.name={arguments.model}"] if arguments.model else []
    arguments.results.mkdir(parents=True, exist_ok=True)
    logs = (arguments.logs or Path(tempfile.mkdtemp(prefix="real-"))).resolve()
    logs.mkdir(parents=True, exist_ok=True)
    print(f"what the runs print: {logs}")
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="real-", dir=in_memory) as scratch:
        end = time.monotonic() + 60 * arguments.minutes
        bench = Bench(arguments.data_dir.resolve(), Path(scratch), logs, [*more, *arguments.set], end)
        jobs = []
        for task, precision in itertools.product(arguments.tasks, arguments.precisions):
            record = load_record(arguments.results / f"{task}-{precision}.json", bench, task, precision)
            done = record["projects"] | {f"plain {seed}": run for seed, run in record["plain"].items()}
            chosen = [f"plain {seed}" for seed in SEEDS] if "plain" in arguments.projects else []
            chosen += [name for name in names[1:] if name in arguments.projects]
            jobs += [
                (task, precision, name)
                for name in chosen
                if arguments.again or done.get(name, {}).get("status") not in ("completed", "not offered")
            ]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            at_a_time = min(arguments.jobs, len(jobs))
            list(pool.map(lambda job: run_one(bench, arguments.results, *job, at_a_time), jobs))
    for task, precision in itertools.product(arguments.tasks, arguments.precisions):
        record = read_json(arguments.results / f"{task}-{precision}.json")
        if limits := band(record):
            print(f"{task}-{precision}: another plain loop would end in {limits[0]:.4f} to {limits[1]:.4f}, with 95%")
    draw(arguments.results)


if __name__ == "__main__":
    main()
