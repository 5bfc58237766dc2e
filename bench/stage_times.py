"""Run a pipeline's train.py and time what each stage computes: `python bench/stage_times.py SCRIPT [arguments]`.

Each rank writes `stage-times-RANK.json` into output_dir: seconds of a forward and of a backward of one micro-batch,
waiting and sending left out, and the rank's own peak of GPU memory. The first steps are left out.
"""

import atexit
import json
import os
import runpy
import statistics
import sys
import time
from pathlib import Path

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from common.run_folder import WARM_UP_STEPS

spans: dict[str, list] = {"forward": [], "backward": []}


def moment():
    """A point in time: of the GPU's stream if there is one, for the CPU runs ahead of it."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def timed(kind: str, execute):
    def run(engine, **arguments):
        begin = moment()
        execute(engine, **arguments)
        if engine.module.training and engine.global_steps >= WARM_UP_STEPS:
            spans[kind].append((begin, moment()))

    return run


def write(folder: Path) -> None:
    if not spans["backward"]:
        return
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        seconds = {kind: [a.elapsed_time(b) / 1e3 for a, b in pairs] for kind, pairs in spans.items()}
    else:
        seconds = {kind: [b - a for a, b in pairs] for kind, pairs in spans.items()}
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    record = {kind: statistics.median(values) for kind, values in seconds.items()} | {"peak_gpu_gib": round(peak, 3)}
    (folder / f"stage-times-{os.environ['RANK']}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


instructions = PipelineEngine._INSTRUCTION_MAP
instructions[schedule.ForwardPass] = timed("forward", instructions[schedule.ForwardPass])
instructions[schedule.BackwardPass] = timed("backward", instructions[schedule.BackwardPass])
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
output = next(a.removeprefix("output_dir=") for a in reversed(sys.argv) if a.startswith("output_dir="))
atexit.register(write, Path(output))
runpy.run_path(sys.argv[0], run_name="__main__")
