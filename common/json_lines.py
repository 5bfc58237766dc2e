"""`metrics.jsonl`: a JSON object a line, written as the run goes and readable at any moment."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path


class JsonLines:
    """An append-only file with a JSON object a line, on disk after every line."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, record: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")

    def read(self) -> list[dict]:
        """All records in the order in which they were written; none where there is no such file.

        A torn line is passed over: a killed run can leave one at the end.
        """
        records = []
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def keep_up_to(self, step: int) -> None:
        """Drop the records behind `step`: a resumed run makes those steps again."""
        kept = [json.dumps(r) + "\n" for r in self.read() if r["step"] <= step]
        temporary = self.path.with_suffix(".partial")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.path)


def finite(record: dict) -> dict:
    """JSON knows no NaN and no infinity: they become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
