"""Read W&B's offline files back."""

import json
from pathlib import Path


def read_wandb(file: Path) -> list:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, records split over them) after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left  # the padding at the end of a block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(part))
            part = b""
    return records


def history(records: list) -> dict[int, dict]:
    rows = {}
    for record in records:
        if record.HasField("history"):
            values = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
            rows[values["_step"]] = values
    return rows


def config(records: list) -> dict:
    """The run's settings: dotted key to value."""
    updates = [update for record in records for update in (*record.config.update, *record.run.config.update)]
    return {(u.key or ".".join(u.nested_key)): json.loads(u.value_json) for u in updates}
