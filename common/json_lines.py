"""`metrics.jsonl`: a JSON object a line, written as the run goes and readable at any moment."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path

from common.files import write_whole


class JsonLines:
    """An append-only file with a JSON object a line, on disk after every line; a full disk leaves no half line."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, record: dict) -> None:
        line = (json.dumps(finite(record)) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise

    def read(self) -> list[dict]:
        """All records in the order in which they were written; none if there is no such file.

        A torn line is passed over: a killed run can leave one at the end.
        """
        records = []
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def keep_up_to(self, step: int) -> None:
        """Drop the records after `step`: a resumed run makes those steps again."""
        kept = [json.dumps(r) + "\n" for r in self.read() if r["step"] <= step]
        write_whole(self.path, "".join(kept))


def finite(record: dict) -> dict:
    """JSON knows no NaN and no infinity: they become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
