"""ASHA over optimizer steps: successive halving for trials that run side by side (https://arxiv.org/abs/1810.05934).

At each rung (a number of optimizer steps) a trial continues only if its held-out loss is among the best 1/reduction of
the losses that earlier trials had at that rung. Ray's `ASHAScheduler` takes for "earlier" what has arrived earlier, so
that its decisions depend on which of two trials was a second faster, and `Tuner.restore` forgets all its rungs. Here
"earlier" is the trial's number, and the rungs are read back from the trials' own files. So a seed has one outcome,
whatever the speed of the trials, and a search that was killed resumes to the same one.

A trial whose earlier neighbours have not come to its rung does not wait for them, which would leave a GPU idle: it
trains on, and is stopped later if it has to be. What it did after the rung does not count then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

if TYPE_CHECKING:
    from trials import Trials


def rungs(grace_period: int, reduction_factor: int, total_steps: int) -> list[int]:
    """Optimizer steps at which trials are compared: grace × reduction^k, below the full budget."""
    found = []
    while grace_period < total_steps:
        found.append(grace_period)
        grace_period *= reduction_factor
    return found


def stops(curves: Sequence[tuple[dict[int, float], bool]], rungs: list[int], reduction_factor: int) -> dict[int, int]:
    """Number of each trial that is to stop → the step of its last evaluation that counts.

    `curves` holds, in the order of the trials' numbers, (step → held-out loss, whether the trial has ended). A trial's
    loss at a rung is that of its first evaluation there or later. What cannot be decided yet is left out.
    """
    stopped = {}
    losses = {rung: [] for rung in rungs}  # of the earlier trials
    pending = set()  # rungs that an earlier trial may yet come to
    for number, (curve, ended) in enumerate(curves):
        for i, rung in enumerate(rungs):
            step = min((step for step in curve if step >= rung), default=None)
            if step is None:
                if not ended:
                    pending.update(rungs[i:])
                break
            earlier = list(losses[rung])
            losses[rung].append(curve[step])
            if rung in pending:
                pending.update(rungs[i + 1 :])  # whether it continues from here is open
                break
            if earlier and curve[step] > np.percentile(earlier, 100 / reduction_factor):
                stopped[number] = step
                break
    return stopped


class OrderedASHA(FIFOScheduler):
    """Ray's interface to `stops`. Without rungs no trial is stopped.

    NOTE: `Tuner.restore` unpickles the scheduler as it was before the first trial, so it may hold nothing that grows:
    what has happened is read from the trials' files, and what happens from Ray's reports.
    """

    def __init__(self, trials: Trials, rungs: list[int], reduction_factor: int):
        super().__init__()
        self._trials, self._rungs, self._reduction = trials, rungs, reduction_factor
        self._curves: dict[int, dict[int, float]] = {}
        self._ended: set[int] = set()

    def on_trial_add(self, tune_controller, trial) -> None:
        record = self._trials.read(str(trial))
        self._curves[record.number] = record.curve
        if record.status or trial.is_finished():
            self._ended.add(record.number)

    def choose_trial_to_run(self, tune_controller):
        """In the order of their numbers, also after `Tuner.restore`, which has them in another."""
        waiting = [trial for trial in tune_controller.get_trials() if trial.status == trial.PENDING]
        return min(waiting, key=str, default=None)

    def on_trial_result(self, tune_controller, trial, result: dict) -> str:
        if result.get("interrupted"):
            return TrialScheduler.NOOP  # it has saved and waits for its end
        number = self._note(trial, result)
        return TrialScheduler.STOP if number in self._stops() else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller, trial, result: dict) -> None:
        self._ended.add(self._note(trial, result))

    def on_trial_error(self, tune_controller, trial) -> None:
        self._ended.add(self._trials.number(str(trial)))

    def _note(self, trial, result: dict) -> int:
        number = self._trials.number(str(trial))
        if "eval_loss" in result:
            self._curves[number][result["step"]] = result["eval_loss"]
        return number

    def _stops(self) -> dict[int, int]:
        curves = [(self._curves.get(n, {}), n in self._ended) for n in range(max(self._curves) + 1)]
        return stops(curves, self._rungs, self._reduction)
