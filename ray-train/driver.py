"""The driver's side of a run: it waits for the workers, shows what they print, and stops them.

Driver and workers are processes on different machines, maybe. What they share is the run folder: rank 0 writes what it
prints into `console.log`, and its stderr into `console-errors.log`. The driver repeats both on its own streams,
progress bar included. The driver asks for a stop by the file `.stop`, which rank 0 looks for after every step.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TextIO

import ray.train

from common import console as common_console
from common.config import BaseConfig
from common.errors import UserError
from common.progress import shows_bars
from common.runtime import StopRequest

LOOK_SECONDS = 0.2


@dataclass
class StopFile:
    """What a `StopRequest` is to a process of its own: `reason` is None until the driver wants the run to stop."""

    path: Path

    @property
    def reason(self) -> str | None:
        return self.path.read_text(encoding="utf-8") if self.path.exists() else None

    def ask(self, reason: str) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(reason, encoding="utf-8")
        partial.rename(self.path)


@dataclass
class Console:
    """Where rank 0 prints: what it writes to `output` and `errors`, the driver repeats on its stdout and stderr."""

    output: Path
    errors: Path
    terminal: bool  # whether the driver's stdout can show progress bars


def output_to(files: Console | None) -> contextlib.AbstractContextManager:
    """Send what this process prints to the ends of `files`; None: leave it as it is."""
    return common_console.output_to(files.output, files.errors, files.terminal) if files else contextlib.nullcontext()


class Failures(ray.train.UserCallback):
    """In Ray's controller: a user error in a worker ends the run, anything else is reported and left to Ray."""

    def __init__(self, console: Console, max_failures: int):
        self.console, self.max_failures, self.count = console, max_failures, 0

    def after_exception(self, run_context, worker_exceptions: dict[int, Exception]) -> None:
        if mistake := find_user_error(*worker_exceptions.values()):
            raise mistake  # an error of the controller, which Ray does not try again
        self.count += 1
        if self.count > self.max_failures:
            return
        # One that died comes first: the other ones failed because of it.
        died = [rank for rank, error in worker_exceptions.items() if hasattr(error, "health_check_failure")]
        rank = min(died or worker_exceptions)
        lines = str(worker_exceptions[rank]).strip().splitlines()
        what = "died" if died else f"failed: {lines[-1]}"
        with output_to(self.console):
            print(
                f"\nwarning: the worker of rank {rank} {what}. Ray starts all workers again "
                f"({self.count} of ray.max_failures={self.max_failures} times)",
                file=sys.stderr,
            )


def find_user_error(*errors: BaseException) -> UserError | None:
    """The user error inside of what Ray wraps around it."""
    for error in errors:
        while error is not None:
            if isinstance(error, UserError):
                return error
            inner = (getattr(error, name, None) for name in ("controller_failure", "_base_exc", "cause", "__cause__"))
            error = next((e for e in inner if isinstance(e, BaseException)), None)
    return None


def fit(trainer, request: StopRequest, stop: StopFile, console: Console) -> int:
    """Run `trainer` to its end; the exit code, which is not 0 if a signal has stopped it.

    Raises `UserError` for a worker's, and what Ray gives for any other failure.
    """
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            trainer.fit()
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    # In a thread: signals come to this one, and Ray's own way with Ctrl-C is to abort.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with console.output.open("rb") as output, console.errors.open("rb") as errors:
        repeats = [Repeat(output, sys.stdout), Repeat(errors, sys.stderr)]
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            for repeat in repeats:
                repeat.new()
            if request.reason and not stop.path.exists():
                stop.ask(request.reason)
                print("\nStopping after this step, with a checkpoint ...", file=sys.stderr, flush=True)
        for repeat in repeats:
            repeat.new()
    if error := ended[0]:
        raise find_user_error(error) or _not_placed(error) or error
    return 128 + signal.Signals[request.signal_name] if request.signal_name else 0


def _not_placed(error: BaseException) -> UserError | None:
    if type(getattr(error, "controller_failure", None)).__name__ != "WorkerGroupStartupTimeoutError":
        return None
    seconds = os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]
    return UserError(
        f"the cluster has not placed all workers within {seconds} seconds: another job holds its GPUs or CPUs. Set "
        f"ray.workers lower, or wait for that job (`ray status` shows what is free)"
    )


@dataclass
class Repeat:
    """Shows on `shown` what is appended to `file`, as text: a terminal may have another encoding."""

    file: BinaryIO
    shown: TextIO
    decoder: codecs.IncrementalDecoder = field(default_factory=codecs.getincrementaldecoder("utf-8"))

    def new(self) -> None:
        if text := self.decoder.decode(self.file.read()):
            self.shown.write(text)
            self.shown.flush()


def open_run_folder(cfg: BaseConfig) -> tuple[Console, StopFile]:
    """The run folder's console and stop file, both new; paths in `cfg` become absolute, as workers may run elsewhere.

    Raises `UserError` if the folder cannot be written.
    """
    cfg.output_dir = os.path.abspath(cfg.output_dir)
    for section, name in ((cfg.model, "name"), (cfg.data, "name"), (cfg.checkpoint, "resume")):
        if os.path.exists(getattr(section, name)):
            setattr(section, name, os.path.abspath(getattr(section, name)))
    folder = Path(cfg.output_dir)
    console = Console(folder / "console.log", folder / "console-errors.log", shows_bars())
    stop = folder / ".stop"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in (console.output, console.errors):
            file.write_bytes(b"")
        stop.unlink(missing_ok=True)
        # What an earlier start noted of its checkpoints. It may name some that are gone, which Ray takes for a damaged
        # run; this start's workers report what is there.
        (folder / "checkpoints/checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={cfg.output_dir}: cannot be written: {error.strerror}") from None
    return console, StopFile(stop)
