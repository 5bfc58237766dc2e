"""What early stopping costs and saves, over several draws of the trials: ray-tune's embedded search, on a CPU.

    python bench/early_stopping.py runs/early-stopping                     # about two and a half minutes a seed on two cores
    python bench/early_stopping.py runs/early-stopping --seeds 42 1 2      # fewer draws

For each seed, twelve trials of `smoke.yaml` run to the end: their first six and nine are what a search of six or nine
would draw. From whole curves it can be told what a search with early stopping would have done, for any first rung and
any reduction: `replay` sends the evaluations to the rule in the order in which two slots would have made them, by the
seconds that each trial took. Two rules: Ray's `AsyncHyperBandScheduler` itself, and ours (ray-tune/asha.py). Then real
searches with the settings of `smoke.yaml` show that they do what the replay said.

How much two losses differ by chance: the best configuration of some seeds is trained several times from the same
weights on the same rows, each time in another order.

What lies in the folder already is not run again. Writes results/ray-tune/early-stopping.json, and the curves beside it.
"""

import argparse
import copy
import csv
import datetime
import heapq
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from types import SimpleNamespace

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "ray-tune"), str(REPOSITORY)]

import asha  # noqa: E402
import space  # noqa: E402
import train  # noqa: E402

from common import models, runtime  # noqa: E402
from common.config import load_config  # noqa: E402
from common.report import read_json, read_metrics  # noqa: E402

SMOKE = REPOSITORY / "ray-tune" / "smoke.yaml"
TRIALS, SLOTS = 12, 2
ORDERS = 8  # of the training data, for the noise
GRID = [(n, grace, reduction) for n in (6, 9, 12) for reduction in (2, 3, 4) for grace in (25, 50, 75, 100)]


@dataclass
class Trial:
    parameters: dict
    losses: dict[int, float]  # optimizer step → held-out loss
    seconds: dict[int, float]  # optimizer step → seconds of training and evaluating up to there


@dataclass
class Outcome:
    """Of a search: the steps that each trial trained, and the best of those that were not stopped."""

    steps: list[int]
    best: int
    stopped: list[int]

    def share(self, trials: list[Trial]) -> float:
        """Device seconds over those of the same trials without early stopping."""
        return sum(t.seconds[s] for t, s in zip(trials, self.steps, strict=True)) / sum(
            max(t.seconds.values()) for t in trials
        )

    def missed(self, trials: list[Trial]) -> float:
        """How much lower the best of all trials' final losses is than that of the trial found (0: it was found)."""
        final = [t.losses[max(t.losses)] for t in trials]
        return final[self.best] - min(final)


def search(folder: Path, *settings: str) -> Path:
    """Run the embedded search, or finish it, and return its folder."""
    if read_json(folder / "summary.json").get("status") != "completed":
        command = [sys.executable, "ray-tune/train.py", "--config", "smoke.yaml", "tracking.backend=none",
                   "checkpoint.every=0", *settings, f"output_dir={folder}"]  # fmt: skip
        paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": paths}, check=True)
    return folder


def read_trials(folder: Path) -> list[Trial]:
    found = []
    for path in sorted((folder / "trials").glob("trial-*")):
        evaluations = [r for r in read_metrics(path) if "eval_loss" in r and r["step"]]
        found.append(
            Trial(
                read_json(path / "parameters.json"),
                {r["step"]: r["eval_loss"] for r in evaluations},
                {r["step"]: r["seconds"] for r in evaluations},
            )
        )
    return found


def replay(trials: list[Trial], stops: Callable[[int, int, float], bool]) -> list[int]:
    """The step at which each trial ends where SLOTS trials run at a time and `stops(number, step, loss)` is asked at
    each evaluation but the last, in the order of the clock.
    """
    ended = [0] * len(trials)
    waiting = iter(range(len(trials)))
    reports: list[tuple[float, int, Iterator[int]]] = []

    def begin(now: float) -> None:
        if (number := next(waiting, None)) is not None:
            steps = iter(sorted(trials[number].losses))
            step = next(steps)
            heapq.heappush(reports, (now + trials[number].seconds[step], number, now, step, steps))

    for _ in range(SLOTS):
        begin(0.0)
    while reports:
        now, number, began, step, steps = heapq.heappop(reports)
        trial = trials[number]
        following = next(steps, None)
        stop = stops(number, step, trial.losses[step])
        if following is None or stop:
            ended[number] = step
            begin(now)
        else:
            heapq.heappush(reports, (began + trial.seconds[following], number, began, following, steps))
    return ended


def with_rays_rule(trials: list[Trial], grace: int, reduction: int) -> Outcome:
    total = max(trials[0].losses)
    scheduler = AsyncHyperBandScheduler("step", "eval_loss", "min", total, grace, reduction)
    names = [SimpleNamespace(trial_id=str(number)) for number in range(len(trials))]
    for name in names:
        scheduler.on_trial_add(None, name)

    def stops(number: int, step: int, loss: float) -> bool:
        result = {"step": step, "eval_loss": loss}
        return scheduler.on_trial_result(None, names[number], result) == TrialScheduler.STOP

    steps = replay(trials, stops)
    finished = [n for n, step in enumerate(steps) if step == total]
    best = min(finished, key=lambda n: trials[n].losses[total])
    return Outcome(steps, best, [n for n in range(len(trials)) if n not in finished])


def with_our_rule(trials: list[Trial], grace: int, reduction: int) -> Outcome:
    total = max(trials[0].losses)
    rungs = asha.rungs(grace, reduction, total)
    seen: list[dict[int, float]] = [{} for _ in trials]
    ended: set[int] = set()

    def decided() -> dict[int, int]:
        return asha.stops([(curve, n in ended) for n, curve in enumerate(seen)], rungs, reduction)

    def stops(number: int, step: int, loss: float) -> bool:
        seen[number][step] = loss
        stop = number in decided()
        if stop or step == total:
            ended.add(number)
        return stop

    steps = replay(trials, stops)
    stopped = decided()
    best = min((n for n in range(len(trials)) if n not in stopped), key=lambda n: trials[n].losses[total])
    return Outcome(steps, best, sorted(stopped))
