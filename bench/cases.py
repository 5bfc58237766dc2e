"""What the measuring programs of all projects share: a case is one run of a train.py by its real launcher.

A case's record in `results/<project>/` holds the command, the machine and the run's summary.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from shares import free_port, machine_variables, multi_process_service, ray_nodes, service_log

from common.report import read_json, read_metrics

REPOSITORY = Path(__file__).resolve().parent.parent
SECONDS_TO_END = 20  # for the others, when one of a run's launchers has failed


@dataclass
class Case:
    label: str  # what the table says
    settings: list[str]
    gpus: int = 2
    variables: dict[str, str] = field(default_factory=dict)  # of the environment
    as_t4: bool = False  # with a T4's attention kernels only
    beside_others: bool = False  # its speed does not count, and it takes so little memory that several run at a time
    project: str = ""  # whose train.py; empty: the one that is measured
    launcher: str = "torchrun"  # or another of start_command's
    through: str = ""  # a program that runs train.py and looks on; its figures are JSON files in the run folder


def start_command(case: Case) -> tuple[list[str], list[str]]:
    """What starts the case's script, and what a user would type for it."""
    python, count = [sys.executable], str(case.gpus)
    foundry = str(REPOSITORY / ".venv-foundry/bin/python")  # LLM Foundry's environment is its own
    return {
        "torchrun": (
            [*python, "-m", "common.torchrun", "--standalone", "--nproc_per_node", count],
            ["torchrun", "--nproc_per_node", count],
        ),
        "deepspeed": ([*python, "-m", "common.deepspeed_launcher", count], ["deepspeed", "--num_accelerators", count]),
        "composer": ([foundry, "llm-foundry-finetune/composer_launcher.py", "-n", count], ["composer", "-n", count]),
        "python": (python, ["python"]),  # which starts processes by itself
    }[case.launcher]


def start_on_machine(case: Case, machine: int, shares: int, port: int) -> tuple[list[str], dict[str, str]]:
    """What starts the case's process on one of as many machines as it has processes, and its environment."""
    count, rank, port = str(case.gpus), str(machine), str(port)
    start, _ = start_command(dataclasses.replace(case, gpus=1))
    address = ["--node_rank", rank, "--master_addr", "127.0.0.1", "--master_port", port]
    if case.launcher == "torchrun":
        start = [*start[: start.index("--standalone")], "--nproc_per_node", "1", "--nnodes", count, *address]
    if case.launcher == "composer":
        start += ["--world_size", count, *address]
    variables = {"NNODES": count, "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # for deepspeed
    return start, variables | machine_variables(machine, shares)


def run_together(commands: list[tuple[list[str], dict[str, str]]]) -> tuple[int, str]:
    """Run commands side by side; the first exit code that is not 0, and what they printed. If one fails, all end."""
    with tempfile.TemporaryFile("w+") as output:
        processes = [
            subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdout=output, stderr=subprocess.STDOUT)
            for command, variables in commands
        ]
        deadline = float("inf")
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                deadline = min(deadline, time.monotonic() + SECONDS_TO_END)
            if time.monotonic() > deadline:  # they wait for the one that failed, and would not save
                for process in (p for p in processes if p.poll() is None):
                    for member in [*psutil.Process(process.pid).children(recursive=True), process]:
                        member.kill()
            time.sleep(0.2)
        output.seek(0)
        return next((p.returncode for p in processes if p.returncode), 0), output.read()


def run_on_shares(
    case: Case, arguments: list[str], environment: dict[str, str], shares: int, folder: Path
) -> tuple[int, str]:
    """Run the case with every process on its share of the GPU, as though that were a machine's only GPU."""
    if case.launcher == "python":  # Ray starts the processes, on a node for each share
        options = ["--num-gpus=1", "--num-cpus=4"]
        nodes = [(options, environment | machine_variables(i, shares)) for i in range(case.gpus)]
        with ray_nodes(folder, nodes) as cluster:
            return run_together([([*start_command(case)[0], *arguments], environment | cluster)])
    port = free_port()
    machines = [start_on_machine(case, i, shares, port) for i in range(case.gpus)]
    return run_together([([*start, *arguments], environment | variables) for start, variables in machines])


def run_case(project: str, name: str, case: Case, common_settings: list[str], shares: int = 0) -> dict:
    """Run the case and return its record; a run that fails is a record too. With `shares`, on shares of one GPU."""
    script = [*(["bench/as_t4.py"] if case.as_t4 else []), *([case.through] if case.through else [])]
    script.append(f"{case.project or project}/train.py")
    settings = [*common_settings, *case.settings]
    variables = {k: v for k, v in case.variables.items() if not (shares and k == "CUDA_VISIBLE_DEVICES")}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        run = Path(folder) / "run"
        start, shown = start_command(case)
        if shares and case.launcher != "python":
            shown = [f"NNODES={case.gpus}", *start_command(dataclasses.replace(case, gpus=1))[1]]
        arguments = [*script, *settings, f"output_dir={run}"]
        environment = (
            os.environ
            | {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # as launch.sh does
            | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
            | variables
        )
        if shares:
            code, output = run_on_shares(case, arguments, environment, shares, Path(folder))
        else:
            code, output = run_together([([*start, *arguments], environment)])
        summary, steps, machine = (
            read_json(run / "summary.json"),
            read_metrics(run),
            read_json(run / "environment.json"),
        )
        seen = {path.stem: read_json(path) for path in sorted(run.glob("stage-times-*.json"))}
    if code:
        print(output[-3000:] + (service_log() if shares > 1 else ""))
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
        "gpu_shares": shares,  # each process has one of so many; 0: a whole GPU
        "summary": summary,
        "first_steps": steps[:6],
        "last_steps": [step for step in steps if "loss" in step][-1:],
        "environment": machine,
        **seen,
    }


def measured_ceiling(shares: int) -> float | None:
    """bf16 TFLOP/s of the GPU or of a share of it; in a process of its own, for this one must hold no memory of it."""
    variables = os.environ | (machine_variables(0, shares) if shares else {})
    command = [sys.executable, "bench/ceiling.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else None


def measure(project: str, cases: dict[str, Case], doc: str, more: Callable[[dict], dict] = lambda record: {}) -> None:
    """The measuring program: parse the command line, run the cases, write `results/<project>/<case>.json`.

    `more` gives what else belongs into the record of a run that completed.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder made by bench/real_shapes.py, with its random weights or without")
    parser.add_argument("--text", help="JSONL with a `text` column in place of the Hub's data set")
    parser.add_argument("--text-is", default="a file of one's own", help="what that text is, for the tables")
    parser.add_argument(
        "--only", nargs="*", default=[""], metavar="NAME", help="this case, or those whose names begin so"
    )
    parser.add_argument(
        "--shares",
        type=int,
        default=0,
        metavar="N",
        help="each process has 1/N of the only GPU; 1: they take turns on all of it (bench/shares.py)",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="behind the settings of every case")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "results" / project)
    arguments = parser.parse_args()

    beginnings = tuple(name for name in arguments.only if name not in cases)
    chosen = {
        name: dataclasses.replace(case, settings=[*case.settings, *arguments.set])
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
        "weights": "random, of the published shapes" if arguments.model else "the published ones",
        "text": arguments.text_is if arguments.text else "the data set of config.yaml",
    }
    arguments.results.mkdir(parents=True, exist_ok=True)

    def record_case(name: str) -> None:
        start = time.perf_counter()
        record = run_case(project, name, chosen[name], settings, arguments.shares) | {
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

    with multi_process_service() if arguments.shares > 1 else contextlib.nullcontext():
        ceiling = measured_ceiling(arguments.shares)
        print(f"measured bf16 matrix-product ceiling: {ceiling} TFLOP/s")
        with ThreadPoolExecutor() as pool:
            list(pool.map(record_case, (name for name, case in chosen.items() if case.beside_others)))
        for name in (name for name, case in chosen.items() if not case.beside_others):
            record_case(name)
