"""Run a train.py on GPUs and take three of its steps apart: `python bench/step_profile.py SCRIPT [arguments]`.

Rank 0 writes `step-profile.json` into output_dir, in seconds per step: while the GPU exchanged, while it computed and
exchanged nothing, and while it did neither; and the longest pause between two exchanges, which is that for the
optimizer if a step is mostly exchange. The steps are those that follow the warm-up, from one step of the optimizer
to the next. The profiler makes them a little longer.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

from common.run_folder import WARM_UP_STEPS

STEPS = 3


def covered_and_pauses(spans: list[tuple[float, float]]) -> tuple[float, list[float]]:
    """The length of what `spans` cover together, and the lengths of what lies between."""
    total, pauses, reached = 0.0, [], None
    for begin, end in sorted(spans):
        if reached is not None and begin > reached:
            pauses.append(begin - reached)
        total += max(0.0, end - max(begin, reached or begin))
        reached = max(reached or end, end)
    return total, pauses


def taken_apart(profiled: profile, seconds: float) -> dict[str, float]:
    """Of STEPS steps, which took `seconds` together."""
    exchanges, computing = [], []
    for event in profiled.events():
        # Ranges of the CPU that the profiler repeats on the GPU's time line are not work of the GPU.
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            span = (event.time_range.start / 1e6, event.time_range.end / 1e6)
            (exchanges if event.name.startswith("nccl") else computing).append(span)
    exchange, pauses = covered_and_pauses(exchanges)
    busy, _ = covered_and_pauses(exchanges + computing)
    found = {
        "step": seconds,
        "exchange": exchange,
        "only_compute": busy - exchange,
        "idle": seconds - busy,
        "longest_pause": sum(sorted(pauses)[-STEPS:]),
    }
    return {name: value / STEPS for name, value in found.items()}


class Profile:
    """Begins after the optimizer's step WARM_UP_STEPS and ends STEPS later."""

    def __init__(self, record: Path):
        self.record, self.steps = record, 0
        self.profile = profile(activities=[ProfilerActivity.CUDA])

    def step(self, *_) -> None:
        self.steps += 1
        if self.steps == WARM_UP_STEPS:
            torch.cuda.synchronize()
            self.profile.start()
            self.began = time.perf_counter()
        elif self.steps == WARM_UP_STEPS + STEPS:
            torch.cuda.synchronize()
            seconds = time.perf_counter() - self.began
            self.profile.stop()
            found = taken_apart(self.profile, seconds)
            self.record.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    output = next(a.removeprefix("output_dir=") for a in reversed(sys.argv) if a.startswith("output_dir="))
    if os.environ["RANK"] == "0":
        register_optimizer_step_post_hook(Profile(Path(output) / "step-profile.json").step)
    runpy.run_path(sys.argv[0], run_name="__main__")
