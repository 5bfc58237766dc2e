"""What watches while the trials run: the progress line, the clean stop, and the order on the disk."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ray.tune import Callback
from ray.tune.experiment import Trial
from trials import Spans, Trials, best

from common.progress import Progress
from common.ray_address import joined
from common.report import read_json
from common.runtime import StopRequest

MOST_SECONDS_TO_SAVE = 300
WAIT_SECONDS = 30  # without any trial, before the user hears why


class Stopping:
    """The request to stop, as all processes of a search see it: a file in the run folder."""

    def __init__(self, root: Path):
        self._path = root / "stop"

    @property
    def reason(self) -> str | None:
        return self._path.read_text(encoding="utf-8") if self._path.exists() else None

    @contextlib.contextmanager
    def follow(self, request: StopRequest) -> Iterator[None]:
        """In the main process: pass the request on as soon as it comes."""
        self._path.unlink(missing_ok=True)  # an earlier search's
        done = threading.Event()

        def look() -> None:
            while not done.wait(0.2):
                if request.reason:
                    partial = self._path.with_suffix(".partial")
                    partial.write_text(request.reason, encoding="utf-8")
                    partial.rename(self._path)
                    return

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._path.unlink(missing_ok=True)


class Watch(Callback):
    """Ray calls this in the main process.

    NOTE: `Tuner.restore` unpickles it as the first start made it, so it holds nothing that changes.
    """

    def __init__(self, trials: Trials, count: int):
        self._trials, self._count = trials, count

    def setup(self, **_) -> None:
        root = self._trials.root.parent
        self._stopping, self._asked, self._saved = Stopping(root), None, set()
        self._spans = Spans(root / "spans.jsonl")
        self._tell_at = time.monotonic() + WAIT_SECONDS
        self._trials.delete_checkpoints()  # what a kill may have left
        ended = sum(bool(record.status) for record in self._trials.read_all())
        if ended:
            print(f"Resuming the search: {ended} of {self._count} trials have ended")
        self._bar, self._read = Progress("Searching", "trial", self._count, ended), {}

    def on_step_begin(self, iteration: int, trials: list[Trial], **_) -> None:
        """Ends Ray's loop once every running trial has saved what it did; warns if the cluster has no room."""
        for trial in trials:
            if trial.status == Trial.RUNNING:
                self._show_warnings(trial)
        if joined() and time.monotonic() > self._tell_at:
            self._tell_at = float("inf")
            self._bar.write(
                "Waiting: the cluster has started no trial yet; `ray status` shows who holds its GPUs and CPUs"
            )
        if not self._stopping.reason:
            return
        self._asked = self._asked or time.monotonic()
        running = {str(trial) for trial in trials if trial.status == Trial.RUNNING}
        if running <= self._saved or time.monotonic() - self._asked > MOST_SECONDS_TO_SAVE:
            signal.raise_signal(signal.SIGUSR1)  # Ray's way to be interrupted: its state is saved, nothing is ended

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_) -> None:
        self._tell_at = float("inf")
        self._spans.note("start", trial=str(trial))

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict, **_) -> None:
        if result.get("interrupted"):
            self._saved.add(str(trial))
            return
        if result["step"] in (*self._trials.rungs, self._trials.total_steps):  # a line where trials are compared
            line = f"{trial}  step {result['step']:>5,} of {self._trials.total_steps:,}  "
            self._bar.write(f"{line}held-out loss {result['eval_loss']:.4f}")
        self._show_best()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_) -> None:
        self._show_warnings(trial)
        step = trial.last_result["step"]
        self._end(trial, "completed" if step >= self._trials.total_steps else "stopped")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_) -> None:
        self._show_warnings(trial)
        own = read_json(self._trials.root / str(trial) / "summary.json")
        error = own.get("error") or _last_line(trial)
        self._bar.write(f"{trial}  failed: {error}")
        self._end(trial, "failed", error)

    def on_experiment_end(self, trials: list[Trial], **_) -> None:
        self._spans.note("session end")
        self._bar.close()

    def _end(self, trial: Trial, status: str, error: str = "") -> None:
        self._spans.note("end", trial=str(trial))
        if not self._trials.read(str(trial)).status:  # else it had ended before a kill, and was counted at the start
            self._trials.end(str(trial), status, error)
            self._bar.update()
        if status == "stopped":
            self._bar.write(f"{trial}  stopped early")
        self._trials.delete_checkpoints()
        self._show_best()

    def _show_best(self) -> None:
        leader = best(self._trials.read_all())
        if leader:
            self._bar.show(f"best {leader.name}: {leader.last[1]:.4f} at step {leader.last[0]:,}")

    def _show_warnings(self, trial: Trial) -> None:
        """What a trial warned of since the last look, such as a tracker that failed: its process has no terminal."""
        file = self._trials.console(str(trial))
        if not file.is_file():
            return
        with file.open("rb") as lines:
            lines.seek(self._read.get(str(trial), 0))
            *whole, _ = lines.read().split(b"\n")
        self._read[str(trial)] = self._read.get(str(trial), 0) + sum(len(line) + 1 for line in whole)
        for line in whole:
            if line.startswith(b"warning:"):
                self._bar.write(f"{trial}  {line.decode(errors='replace')}")


def _last_line(trial: Trial) -> str:
    """What Ray reports of a trial that could not report it itself, such as a process that the system killed."""
    file = Path(trial.error_file) if trial.error_file else None
    lines = file.read_text(encoding="utf-8").strip().splitlines() if file and file.is_file() else []
    return lines[-1].strip() if lines else "its process died"
