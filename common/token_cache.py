"""Tokenized rows on disk: made once per machine, then memory-mapped by all ranks and later runs.

    HF_HOME/multi-gpu-fine-tuning/rows-<key>/     only its owner may read it: the rows may be private
        training-tokens.npy  training-labels.npy  held_out-tokens.npy  …
        rows.json                                 the counts of the rows, and a digest of each file

eval.py keeps the held-out rows themselves in the same way.

The key is a digest of everything that an entry depends on: the content of the rows and of the tokenizer, the settings,
this program and its libraries. A name, a path or a time of change is not part of it.

The first process that misses an entry makes it, and the other ones wait for its lock. The system releases the lock when
its holder is killed, and the next process takes over. An entry appears whole, by a rename, and its content is checked
whenever it is opened. If nothing can be written, every process keeps rows of its own in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch.distributed as dist
import xxhash

from common.errors import UserError
from common.files import cache_folder, remove

VARIABLE = "TOKEN_CACHE_GB"
DEFAULT_GB = 20.0
DAY = 24 * 3600
MOST_DAYS = 30  # that an entry is kept without being used
INDEX = "rows.json"
LIBRARIES = ("transformers", "tokenizers", "datasets", "pyarrow", "jinja2")  # whose versions may change tokens
PATIENCE = timedelta(hours=12)  # for the slowest machine

Rows = TypeVar("Rows")  # a dataclass: arrays, and what JSON can hold


def made_once(
    identity: dict[str, Any] | None, make: Callable[[bool], dict[str, Rows]], kind: type[Rows], *, is_main: bool
) -> dict[str, Rows]:
    """`make(…)`, rows of this `kind` by their part, kept under what they depend on; their arrays are read-only.

    `make` is told whether to show its progress. If `identity` is None, nothing is kept. `is_main`: this process is the
    one that reports that nothing can be kept.
    """
    limit = _limit()
    if identity is None or not limit:
        return make(is_main)
    folder = cache_folder() / f"rows-{digest(identity, _program())}"
    if found := _read(folder, kind):
        return found
    with contextlib.ExitStack() as until_made:
        try:
            until_made.enter_context(_alone(folder.with_suffix(".lock")))
        except OSError as error:
            _warn(folder, error, is_main)
            return make(is_main)
        if found := _read(folder, kind):  # another process has made it meanwhile
            return found
        made = make(True)
        try:
            _write(folder, made)
        except OSError as error:
            _warn(folder, error, is_main)
            return made
        _remove_oldest(folder, limit)
        if not (found := _read(folder, kind)):
            return made
        del made
        _release_memory()
        return found


def wait_for_all_ranks(succeeded: bool) -> None:
    """Wait until every rank has its rows: another machine may still be making them, for longer than a collective waits.

    Raises `UserError` if another rank has failed. Every rank calls this, also one that failed itself.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    store = dist.distributed_c10d._get_default_store()  # the group's own: needs no collective, and so no timeout of one
    keys = [f"rows-of-rank-{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], "made" if succeeded else "failed")
    if not succeeded:
        return
    store.wait(keys, PATIENCE)
    if failed := [rank for rank, key in enumerate(keys) if store.get(key) != b"made"]:
        raise UserError(f"rank {failed[0]} could not load its rows: its own message says why")


def digest(*parts: Any) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_file(path: Path) -> str:
    """Of its content, at the speed of the disk; it is not meant to withstand an attacker."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def digest_of_table(table: pa.Table) -> str:
    """Of the values of all columns, their names and types."""
    content = xxhash.xxh3_128(str(table.schema.remove_metadata()).encode())
    for batch in table.replace_schema_metadata().to_batches(max_chunksize=10_000):
        content.update(batch.serialize())
    return content.hexdigest()


def _limit() -> float:
    """The most bytes that entries not in use may take; 0: keep nothing."""
    set_to = os.environ.get(VARIABLE) or str(DEFAULT_GB)
    with contextlib.suppress(ValueError):
        if math.isfinite(limit := float(set_to)) and limit >= 0:
            return limit * 1e9
    raise UserError(f"{VARIABLE}={set_to}: set it to the GB that tokenized rows may take on disk, or to 0 to keep none")


def _program() -> list[str]:
    """What makes the tokens: this package, and the libraries that it calls."""
    sources = [digest_of_file(path) for path in sorted(Path(__file__).parent.glob("*.py"))]
    return [*sources, *map(importlib.metadata.version, LIBRARIES)]


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process of this machine is in such a block; the end of a process ends its block."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "ab", opener=_private) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _read(folder: Path, kind: type[Rows]) -> dict[str, Rows] | None:
    """The entry's rows; None if it is not there or not what was written."""
    try:
        # Never closed: while a process holds this lock, `_remove_oldest` leaves the entry alone.
        index = os.open(folder / INDEX, os.O_RDONLY)
        fcntl.flock(index, fcntl.LOCK_SH)
        rows = {}
        for part, saved in json.loads((folder / INDEX).read_text(encoding="utf-8")).items():
            files = {name: folder / f"{part}-{name}.npy" for name in saved["arrays"]}
            if any(digest_of_file(file) != saved["arrays"][name] for name, file in files.items()):
                return None
            # Plain arrays: of `np.memmap`, Ray would pickle a copy for each trial.
            arrays = {name: np.asarray(np.load(file, mmap_mode="r")) for name, file in files.items()}
            rows[part] = kind(**arrays, **saved["others"])
        with contextlib.suppress(OSError):
            os.utime(folder)  # the entry was used just now
        return rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(folder: Path, rows: dict[str, Rows]) -> None:
    scratch = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    try:
        scratch.mkdir(mode=0o700)
        index = {}
        for part, each in rows.items():
            fields = {name: value for name, value in vars(each).items() if value is not None}
            arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
            digests = {}
            for name, array in arrays.items():
                file = scratch / f"{part}-{name}.npy"
                with open(file, "wb", opener=_private) as writer:
                    # Not `np.save`, which overlooks that a disk is full.
                    np.lib.format.write_array_header_1_0(writer, np.lib.format.header_data_from_array_1_0(array))
                    writer.write(array.data)
                    writer.flush()
                    os.fsync(writer.fileno())  # else a crash of the machine may leave a renamed folder of empty files
                digests[name] = digest_of_file(file)
            others = {name: value for name, value in fields.items() if name not in arrays}
            index[part] = {"arrays": digests, "others": others}
        with open(scratch / INDEX, "w", opener=_private, encoding="utf-8") as writer:
            json.dump(index, writer, indent=1)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _release_memory() -> None:
    """Give what the rows took as Python and Arrow objects back to the system; the allocators would keep most of it."""
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _remove_oldest(new: Path, limit: float) -> None:
    """Remove the least recently used entries until all take `limit` bytes, and those of long ago.

    None in use, nor `new`. Also what processes that failed or were killed have left.
    """
    now = time.time()
    with contextlib.suppress(OSError):  # another process may be removing them, too
        for left in (*new.parent.glob(".writing-rows-*"), *new.parent.glob("rows-*.lock")):
            if left.stat().st_mtime < now - DAY:
                remove(left)
        entries = sorted(new.parent.glob("rows-*/"), key=lambda entry: entry.stat().st_mtime, reverse=True)
        taken = 0
        for entry in [new, *(entry for entry in entries if entry != new)]:
            taken += sum(file.stat().st_size for file in entry.iterdir())
            if entry != new and (taken > limit or entry.stat().st_mtime < now - MOST_DAYS * DAY):
                _remove_unless_used(entry)


def _remove_unless_used(entry: Path) -> None:
    with contextlib.suppress(OSError), (entry / INDEX).open("r+b") as index:
        fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(entry)
        entry.with_suffix(".lock").unlink(missing_ok=True)


def _warn(folder: Path, error: OSError, is_main: bool) -> None:
    if is_main:
        print(
            f"warning: tokenized rows are not kept, each process makes its own: {folder.parent}: "
            f"{error.strerror or error}; set HF_HOME to a folder that can be written",
            file=sys.stderr,
            flush=True,
        )
