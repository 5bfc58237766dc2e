"""What the measuring programs of all projects share: a case is one run of a train.py by its real launcher.

A case's record in `results/<project>/` holds the command, the machine and the run's summary.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from shares import multi_process_service, ray_nodes, service_log, share_of_node

from common import runtime
from common.report import read_json, read_metrics
from common.run_folder import WARM_UP_STEPS

REPOSITORY = Path(__file__).resolve().parent.parent

WINDOWS = 5  # that the steps after the warm-up are divided into; a speed is their median


@dataclass
class Case:
    label: str  # what the table shows
    settings: list[str]
    gpus: int = 2
    variables: dict[str, str] = field(default_factory=dict)  # of the environment
    as_t4: bool = False  # with a T4's attention kernels only
    beside_others: bool = False  # its speed does not count, and it takes so little memory that several run at a time
    project: str = ""  # whose train.py; empty: the one that is measured
    launcher: str = "torchrun"  # or another of start_command's
    through: str = ""  # a program that runs train.py and watches it; its figures are JSON files in the run folder
    look: Callable[[Path], dict] = lambda run: {}  # what else the record of a completed run takes from its folder


def start_command(case: Case) -> tuple[list[str], list[str]]:
    """What starts the case's script, and what a user would type for it."""
    python, count = [sys.executable], str(case.gpus)
    foundry = str(REPOSITORY / ".venv-foundry/bin/python")  # LLM Foundry's environment is its own
    return {
        "torchrun": (
            [*python, "-m", "launchers.torchrun", "--standalone", "--nproc_per_node", count],
            ["torchrun", "--nproc_per_node", count],
        ),
        "deepspeed": (
            [*python, "-m", "launchers.deepspeed_launcher", count],
            ["deepspeed", "--num_accelerators", count],
        ),
        "composer": ([foundry, "llm-foundry-finetune/composer_launcher.py", "-n", count], ["composer", "-n", count]),
        "python": (python, ["python"]),  # which starts processes by itself
    }[case.launcher]


def windows(steps: list[dict]) -> list[float]:
    """Tokens per second in each of WINDOWS stretches of equally many steps, after the warm-up; none of a short run."""
    steady = [step for step in steps if "loss" in step][WARM_UP_STEPS:]
    size = len(steady) // WINDOWS
    parts = [steady[start : start + size] for start in range(0, size * WINDOWS, size)] if size else []
    return [round(sum(s["tokens"] for s in part) / sum(s["step_seconds"] for s in part), 1) for part in parts]


def run_case(project: str, name: str, case: Case, common_settings: list[str], shares: int, log: Path) -> dict:
    """Run the case and return its record; a run that fails is a record too. With `shares`, on shares of one GPU.

    What it prints goes to `log`.
    """
    script = [*(["bench/as_t4.py"] if case.as_t4 else []), *([case.through] if case.through else [])]
    script.append(f"{case.project or project}/train.py")
    settings = [*common_settings, *case.settings]
    variables = dict(case.variables)
    by_ray = case.launcher == "python"  # which starts the processes, on a node for each share
    if shares:
        variables = {k: v for k, v in variables.items() if k != "CUDA_VISIBLE_DEVICES"} | {"GPU_SHARES": str(shares)}
        if not by_ray:
            script.insert(0, "launchers/gpu_share.py")
    start, shown = start_command(case)
    with contextlib.ExitStack() as stack:
        folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
        run = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder))) / "run"
        environment = (
            os.environ
            | {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # as launch.sh does
            | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
            | variables
        )
        if shares and by_ray:
            options = ["--num-gpus=1", "--num-cpus=4"]
            nodes = [(options, environment | share_of_node(environment, i)) for i in range(case.gpus)]
            environment |= stack.enter_context(ray_nodes(run.parent, nodes))
        command = [*start, *script, *settings, f"output_dir={run}"]
        with log.open("wb") as file:
            done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file)
        summary, steps = read_json(run / "summary.json"), read_metrics(run)
        machine = read_json(run / "environment.json")
        left = sorted([*run.glob("stage-times-*.json"), *run.glob("step-profile.json")])
        seen = {path.stem: read_json(path) for path in left}
        if summary.get("status") == "completed":
            seen |= case.look(run)
    if done.returncode:
        output = log.read_text(errors="replace")
        print(output[-3000:] + service_log())
        summary.setdefault("status", "failed")  # before it began
        summary.setdefault("error", next((x for x in output.splitlines() if "error:" in x), "see the output"))
    return {
        "project": case.project or project,
        "case": name,
        "label": case.label,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(
            [*(f"{k}={v}" for k, v in variables.items()), *shown, *script]
            + [re.sub(r"=/.*/", "=", setting) for setting in settings]
        ),
        "settings": dict(s.split("=", 1) for s in case.settings),
        "gpus": case.gpus,
        "summary": summary,
        "windows": windows(steps),
        "first_steps": steps[:6],
        "last_steps": [step for step in steps if "loss" in step][-1:],
        "environment": machine,
        **seen,
    }


def measured_ceiling(shares: int) -> float | None:
    """bf16 TFLOP/s of the GPU or of a share of it; in a process of its own, for this one must hold no memory of it."""
    variables = os.environ | ({"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(100 // shares)} if shares else {})
    command = [sys.executable, "bench/ceiling.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else None


def measure(project: str, cases: dict[str, Case], doc: str, more: Callable[[dict], dict] = lambda record: {}) -> None:
    """The measuring program: parse the command line, run the cases, write `results/<project>/<case>.json`.

    `more` gives what else belongs into the record of a run that completed.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder made by bench/real_shapes.py, with its random weights or without")
    parser.add_argument("--text", help="JSONL with a `text` column instead of the Hub's dataset")
    parser.add_argument("--text-is", default="a file of one's own", help="what that text is, for the tables")
    parser.add_argument(
        "--only", nargs="*", default=[""], metavar="NAME", help="this case, or those whose names begin so"
    )
    parser.add_argument(
        "--shares",
        type=int,
        default=0,
        metavar="N",
        help="each process has 1/N of a GPU (launchers/gpu_share.py)",
    )
    parser.add_argument(
        "--turns", action="store_true", help="with --shares: the processes take turns on all of the GPU"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="after the settings of every case")
    parser.add_argument("--dirty", action="store_true", help="measure with local changes; the tables then say so")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "results" / project)
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what each case prints, in NAME.log there")
    arguments = parser.parse_args()
    commit = runtime.git_commit() or "with local changes: no Git"
    if "with local changes" in commit and not arguments.dirty:
        sys.exit(
            "error: tracked files differ from the commit, which a record must name: commit them first, or add --dirty"
        )

    beginnings = tuple(name for name in arguments.only if name not in cases)
    chosen = {
        name: replace(case, settings=[*case.settings, *arguments.set])
        for name, case in cases.items()
        if name in arguments.only or name.startswith(beginnings)
    }
    gpus = max((case.gpus for case in chosen.values()), default=0)
    if torch.cuda.device_count() < (1 if arguments.shares else gpus):
        sys.exit(f"error: these cases need {gpus} GPUs, and this machine has {torch.cuda.device_count()}")
    settings = ["tracking.backend=none", "eval.every=0", "checkpoint.every=0", "train.learning_rate=1e-4"]
    if arguments.model:
        settings.append(f"model.name={arguments.model}")
        if not list(Path(arguments.model).glob("*.safetensors")):
            settings.append("model.random_weights=true")
    if arguments.text:
        settings.append(f"data.name={arguments.text}")
    source = {
        # As it was typed, without this machine's folders.
        "measured_by": shlex.join(
            ["python", f"bench/{Path(sys.argv[0]).name}", *(re.sub(r"^/.*/", "", a) for a in sys.argv[1:])]
        ),
        "weights": "random, of the published shapes" if arguments.model else "the published ones",
        "text": arguments.text_is if arguments.text else "the dataset of config.yaml",
    }
    logs = arguments.logs or Path(tempfile.mkdtemp(prefix="bench-"))
    for folder in (arguments.results, logs):
        folder.mkdir(parents=True, exist_ok=True)

    def record_case(name: str) -> None:
        start = time.perf_counter()
        record = run_case(project, name, chosen[name], settings, arguments.shares, logs / f"{name}.log") | {
            "matmul_ceiling_tflops": ceiling,
            **source,
        }
        s = record["summary"]
        if s["status"] == "completed":
            record |= more(record)
        (arguments.results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(
            f"{name:32} {s['status']}  {s.get('tokens_per_second', 0):>10,.0f} tokens/s  "
            f"{s.get('peak_gpu_gib') or 0:6.2f} GiB  loss {s.get('first_loss')} -> {s.get('last_loss')}  "
            f"{s.get('error', '')}  ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )

    print(f"what the cases print: {logs}")
    with multi_process_service() if arguments.shares and not arguments.turns else contextlib.nullcontext():
        ceiling = measured_ceiling(arguments.shares)
        print(f"measured bf16 matrix-product ceiling: {ceiling} TFLOP/s")
        with ThreadPoolExecutor() as pool:
            list(pool.map(record_case, (name for name, case in chosen.items() if case.beside_others)))
        for name in (name for name, case in chosen.items() if not case.beside_others):
            record_case(name)
