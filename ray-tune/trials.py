"""The trials of a search as their run folders record them, which one is the best, and which checkpoints may go."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import asha

from common.errors import UserError
from common.files import write_json
from common.json_lines import JsonLines
from common.report import read_json, read_metrics, series


@dataclass
class Record:
    """What is known of a trial. `status` is empty as long as it has not ended; then completed, stopped or failed."""

    name: str
    number: int
    folder: Path
    parameters: dict[str, Any] = field(default_factory=dict)
    status: str = ""
    error: str = ""
    curve: dict[int, float] = field(default_factory=dict)  # optimizer step → held-out loss
    seconds: float = 0.0  # that it trained and evaluated
    steps: int = 0  # that it trained

    @property
    def last(self) -> tuple[int, float]:
        """Step and held-out loss of the last evaluation that counts."""
        return max(self.curve.items(), default=(0, float("inf")))


@dataclass
class Trials:
    """The folder `trials/` of a search. Holds only what stays the same over the whole search: Ray pickles it."""

    root: Path
    total_steps: int
    rungs: list[int]
    reduction_factor: int

    @staticmethod
    def name(number: int) -> str:
        return f"trial-{number:03d}"

    @staticmethod
    def number(name: str) -> int:
        return int(name.removeprefix("trial-"))

    def console(self, name: str) -> Path:
        """What a trial's process prints, which Ray would hide in its own logs."""
        return self.root / name / "console.log"

    def read(self, name: str) -> Record:
        folder = self.root / name
        ended, metrics = read_json(folder / "ended.json"), read_metrics(folder)
        curve = {step: loss for step, loss in series(metrics, "eval_loss").items() if step}
        return Record(
            name,
            self.number(name),
            folder,
            read_json(folder / "parameters.json"),
            ended.get("status", ""),
            ended.get("error", ""),
            curve,
            metrics[-1]["seconds"] if metrics else 0.0,
            max(series(metrics, "loss"), default=0),
        )

    def read_all(self) -> list[Record]:
        """All trials so far by number, with what ASHA decided: of a trial that was stopped, the curve ends there."""
        records = [self.read(folder.name) for folder in sorted(self.root.glob("trial-*"))]
        by_number = {record.number: record for record in records}
        count = max(by_number, default=-1) + 1
        known = [by_number.get(n) for n in range(count)]
        curves = [(r.curve, bool(r.status)) if r else ({}, False) for r in known]
        for number, step in asha.stops(curves, self.rungs, self.reduction_factor).items():
            record = by_number[number]
            if step >= self.total_steps:  # its first evaluation after the last rung is its last one: nothing is left
                continue
            record.status = record.status and "stopped"
            record.curve = {at: loss for at, loss in record.curve.items() if at <= step}
        return records

    def end(self, name: str, status: str, error: str = "") -> None:
        """Note durably that a trial has ended: Ray's own state may be some seconds old when the search is killed."""
        self.root.joinpath(name).mkdir(parents=True, exist_ok=True)
        partial = self.root / name / "ended.partial"
        write_json(partial, {"status": status, "error": error})
        partial.rename(self.root / name / "ended.json")

    def delete_checkpoints(self) -> None:
        """Of the trials that have ended, only the best one's checkpoint stays."""
        records = [record for record in self.read_all() if record.status]
        kept = best(records)
        for record in records:
            if record is not kept:
                shutil.rmtree(record.folder / "checkpoints", ignore_errors=True)


def best(records: list[Record]) -> Record | None:
    """The trial that got furthest, and of those the one with the lowest held-out loss; None if all failed."""
    ranked = ranking([r for r in records if r.status not in ("", "failed") and r.curve])
    return ranked[0] if ranked else None


def ranking(records: list[Record]) -> list[Record]:
    """Best first. Losses are compared at equal steps only: a schedule's last steps lower the loss by themselves."""
    return sorted(records, key=lambda r: (r.status == "failed", -r.last[0], r.last[1], r.number))


def lock(path: Path, seconds: float, message: str) -> TextIO:
    """Hold `path` until this process ends or the file is closed.

    Raises `UserError` with `message` if another process holds it for `seconds`, and where it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"output_dir={path.parent}: cannot be written: {error.strerror}") from None
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        if time.monotonic() > deadline:
            raise UserError(message)
        time.sleep(0.1)


class Spans:
    """`spans.jsonl`: when each trial held its device, over all starts of the search."""

    def __init__(self, path: Path):
        self._lines = JsonLines(path)

    def note(self, event: str, **what: str | int) -> None:
        """A `session` (a start of the search, with its `devices`) and its end; a `trial`'s start and end."""
        self._lines.append({"time": round(time.time(), 2), "event": event, **what})

    def busy(self) -> dict[str, float | None]:
        """How many devices the last session had; seconds from the first trial's start to the last one's end, over all
        sessions; the busy share of the devices; that share up to the start of the last trial, from when on a device may
        find nothing left to do.
        """
        wall = room = used = until_room = until_used = 0.0
        devices = None
        for session, *events in self._sessions():
            devices = session["devices"]
            if not any(e["event"] == "start" for e in events):
                continue
            begin, end = events[0]["time"], events[-1]["time"]
            last_start = max(e["time"] for e in events if e["event"] == "start")
            open_since: dict[str, float] = {}
            spans = []
            for e in events:
                if e["event"] == "start":
                    open_since[e["trial"]] = e["time"]
                elif e.get("trial") in open_since:
                    spans.append((open_since.pop(e["trial"]), e["time"]))
            spans += [(since, end) for since in open_since.values()]
            wall, room = wall + end - begin, room + devices * (end - begin)
            until_room += devices * (last_start - begin)
            used += sum(b - a for a, b in spans)
            until_used += sum(min(b, last_start) - min(a, last_start) for a, b in spans)
        return {
            "devices": devices,
            "wall_seconds": round(wall, 1),
            "devices_busy": round(used / room, 4) if room else None,
            "devices_busy_until_last_start": round(until_used / until_room, 4) if until_room else None,
        }

    def _sessions(self) -> list[list[dict]]:
        sessions: list[list[dict]] = []
        for event in self._lines.read():
            if event["event"] == "session":
                sessions.append([])
            sessions[-1].append(event)
        return sessions
