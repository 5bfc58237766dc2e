"""Measure pytorch-ddp on this machine's GPUs and write a record of each case to results/pytorch-ddp/.

    python bench/ddp.py                                     # the model and data of config.yaml, from the Hub
    python bench/ddp.py --model FOLDER --text FILE.jsonl    # without the Hub: real shapes (bench/real_shapes.py)
    python bench/ddp.py --only memory speed-2gpu            # cases whose names begin so

A case is one run of train.py by the real launcher; its record holds the command, the machine and the run's summary.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common.report import read_json, read_metrics

REPOSITORY = Path(__file__).resolve().parent.parent
SPEED = ["data.max_length=1024", "train.global_batch_size=256", "train.micro_batch_size=64", "train.max_steps=12",
         "train.precision=bf16", "train.compile=true", "data.eval_rows=64", "data.train_rows=0"]  # fmt: skip
T4 = ["train.precision=fp16", "runtime.gpu_memory_limit_gib=14.7", "data.max_length=512", "train.global_batch_size=32",
      "data.eval_rows=64", "data.train_rows=0"]  # fmt: skip

# name: (GPUs, environment, as a T4, settings, what the table says)
CASES = {
    "memory-micro-4": (2, {}, True, [*T4, "train.micro_batch_size=4", "train.max_steps=100"], "micro-batch 4"),
    "speed-1gpu": (1, {}, False, SPEED, "one GPU"),
    "speed-2gpu": (2, {}, False, SPEED, "two GPUs, NVLink"),
    "speed-2gpu-no-p2p": (2, {"NCCL_P2P_DISABLE": "1"}, False, SPEED, "two GPUs, no peer access (through host memory)"),
    "speed-2gpu-no-p2p-bf16": (
        2, {"NCCL_P2P_DISABLE": "1"}, False, [*SPEED, "ddp.gradient_compression=bf16"],
        "the same, gradients travel in bf16",
    ),
    "speed-2gpu-eager": (
        2, {}, False, [*SPEED, "train.compile=false", "train.micro_batch_size=32"],
        "two GPUs, NVLink, not compiled, micro-batch 32",
    ),
    "memory-micro-8": (2, {}, True, [*T4, "train.micro_batch_size=8", "train.max_steps=12"], "micro-batch 8"),
    "memory-micro-16": (2, {}, True, [*T4, "train.micro_batch_size=16", "train.max_steps=12"], "micro-batch 16"),
    "memory-micro-16-checkpointing": (
        2, {}, True, [*T4, "train.micro_batch_size=16", "train.max_steps=12", "train.activation_checkpointing=true"],
        "micro-batch 16, activation checkpointing",
    ),
}  # fmt: skip


def run_case(name: str, common_settings: list[str], ceiling: float | None, source: dict[str, str]) -> dict:
    gpus, variables, as_t4, settings, label = CASES[name]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        script = ["bench/as_t4.py", "pytorch-ddp/train.py"] if as_t4 else ["pytorch-ddp/train.py"]
        arguments = ["--standalone", "--nproc_per_node", str(gpus), *script, *common_settings, *settings]
        command = [sys.executable, "-m", "common.torchrun", *arguments, f"output_dir={folder}/run"]
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
            | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        summary = read_json(Path(folder) / "run" / "summary.json")
        steps = read_metrics(Path(folder) / "run")
        environment = read_json(Path(folder) / "run" / "environment.json")
    if done.returncode:
        print(done.stdout[-3000:])
        summary.setdefault("error", next((x for x in done.stdout.splitlines() if "error:" in x), "see the output"))
    return {
        "project": "pytorch-ddp",
        "case": name,
        "label": label,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(
            [*(f"{k}={v}" for k, v in variables.items()), "torchrun", "--nproc_per_node", str(gpus), *script]
            + [re.sub(r"=/.*/", "=", setting) for setting in [*common_settings, *settings]]
        ),
        "settings": dict(s.split("=", 1) for s in settings),
        "gpus": gpus,
        "matmul_ceiling_tflops": ceiling,
        "summary": summary,
        "first_steps": steps[:6],
        **source,
        "environment": environment,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder made by bench/real_shapes.py; its weights are random")
    parser.add_argument("--text", help="JSONL with a `text` column in place of the Hub's data set")
    parser.add_argument("--text-is", default="a file of one's own", help="what that text is, for the tables")
    parser.add_argument("--only", nargs="*", default=[""], metavar="NAME", help="cases whose names begin so")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "results" / "pytorch-ddp")
    arguments = parser.parse_args()

    if torch.cuda.device_count() < 2:
        sys.exit(f"error: these cases need two GPUs, and this machine has {torch.cuda.device_count()}")
    settings = ["tracking.backend=none", "eval.every=0", "checkpoint.every=0", "train.learning_rate=1e-4"]
    if arguments.model:
        settings += [f"model.name={arguments.model}", "model.random_weights=true"]
    if arguments.text:
        settings.append(f"data.name={arguments.text}")
    source = {
        "weights": "random, of the published shapes" if arguments.model else "the published ones",
        "text": arguments.text_is if arguments.text else "the data set of config.yaml",
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    # In a process of its own: this one must hold no memory of the GPU.
    measured = subprocess.run([sys.executable, "bench/ceiling.py"], cwd=REPOSITORY, capture_output=True, text=True)
    ceiling = float(measured.stdout) if measured.returncode == 0 else None
    print(f"measured bf16 matrix-product ceiling: {ceiling} TFLOP/s")
    for name in (n for n in CASES if n.startswith(tuple(arguments.only))):
        start = time.perf_counter()
        record = run_case(name, settings, ceiling, source)
        (arguments.results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        s = record["summary"]
        print(
            f"{name:32} {s.get('status')}  {s.get('tokens_per_second', 0):>10,.0f} tokens/s  "
            f"{s.get('peak_gpu_gib', 0):6.2f} GiB  loss {s.get('first_loss')} -> {s.get('last_loss')}  "
            f"{s.get('error', '')}  ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
