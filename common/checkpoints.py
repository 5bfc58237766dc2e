"""Checkpoint folders: written next to their place, renamed into it, checked before they are read.

What is inside belongs to the project; here is what makes a folder that exists a whole one.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from common.config import BaseConfig, get
from common.errors import UserError

MANIFEST = "manifest.json"
DATA = "the training data's fingerprint"
# Keys that a run cannot change and still be the same run: what it trains on, and what the optimizer's state holds. The
# rest may change: more steps, another learning rate or micro-batch, another number of processes. Not data.name: the
# same rows may lie in another place by now, and the data's fingerprint knows them.
IDENTITY = (
    "model.name",
    "model.revision",
    "data.format",
    "data.max_length",
    "data.packing",
    "seed",
    "train.global_batch_size",
    "train.weight_decay",
)


class Checkpoints:
    """The folder `checkpoints/` of a run: `step-00000020/` and so on, at most `keep` of them.

    Every rank calls `writing(step)` for the place to write to; the main process calls `begin` before, `commit` after
    all ranks have written.
    """

    def __init__(self, root: Path, keep: int, identity: dict):
        self.root, self.keep, self.identity = root, keep, identity
        self._resumed_from, self._written = math.inf, set()

    def writing(self, step: int) -> Path:
        """Where a checkpoint is written until it is committed."""
        return self.root / f".writing-{step:08d}"

    def folder(self, step: int) -> Path:
        """The folder of the committed checkpoint."""
        return self.root / f"step-{step:08d}"

    def begin(self, step: int) -> None:
        for leftover in self.root.glob(".writing-*"):  # of a run that was killed while it saved
            shutil.rmtree(leftover)
        self.writing(step).mkdir(parents=True)

    def commit(self, step: int) -> None:
        """Make the written folder a checkpoint: list its files with their checksums, rename it, drop what is too many.

        Those of steps that this run did not pass are dropped as well: it resumed from an earlier one, or started
        from scratch, and they belong to another course.
        """
        folder, final = self.writing(step), self.folder(step)
        files = _fingerprints(folder, sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))
        manifest = {"step": step, "identity": self.identity, "files": files}
        manifest["crc32"] = _checksum(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*folder.rglob("*"), folder):
            _to_disk(path)
        _discard(final)
        folder.rename(final)
        _to_disk(self.root)  # the new one is safe before an old one goes
        self._written.add(step)
        found = self.all()
        ours = [at for at, _ in found if at <= step and (at in self._written or at <= self._resumed_from)]
        for at, old in found:
            if at not in ours[: self.keep]:
                _discard(old)

    def find(self, resume: str) -> tuple[int, Path] | None:
        """The (step, folder) to resume from for `checkpoint.resume`, or None to start from scratch.

        `auto` takes the newest complete checkpoint and reports damaged ones. Raises `UserError` if all are damaged, for
        a path that is not a complete checkpoint, and for a checkpoint of another model or other data.
        """
        self._resumed_from = 0
        ours = {"never": [], "auto": [folder for _, folder in self.all()]}
        candidates = ours.get(resume, [Path(resume)])
        for folder in candidates:
            if not (problem := damage(folder)):
                step = self._step_of(folder)
                if folder.parent.resolve() == self.root.resolve():
                    self._resumed_from = step
                return step, folder
            if resume != "auto":
                raise UserError(f"checkpoint.resume={resume}: {problem}")
            print(f"warning: {folder} is damaged and is passed over: {problem}", file=sys.stderr)
        if candidates:
            raise UserError(
                f"{self.root}: every checkpoint in it is damaged; set checkpoint.resume=never to start from scratch, "
                f"or another output_dir"
            )
        return None

    def all(self) -> list[tuple[int, Path]]:
        """(step, folder) of every checkpoint, the newest first."""
        matches = [(re.fullmatch(r"step-(\d+)", p.name), p) for p in self.root.glob("step-*")]
        return sorted(((int(m[1]), p) for m, p in matches if m), reverse=True)

    def _step_of(self, folder: Path) -> int:
        """Raises `UserError` if it is another run's checkpoint."""
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for key, ours in self.identity.items():
            theirs = manifest["identity"].get(key)
            if theirs != ours:
                why = " (data.name, another data key or the file itself has changed)" if key == DATA else ""
                raise UserError(
                    f"{key} is {ours}, but {folder} was written with {theirs}{why}: set it back, choose another "
                    f"output_dir, or set checkpoint.resume=never to start from scratch"
                )
        return manifest["step"]


def identity(cfg: BaseConfig, project: str, architecture: str, data_fingerprint: str) -> dict:
    """What must be equal for a run to resume from a checkpoint. Each project has files of its own in it."""
    return {
        "the project": project,
        **{key: get(cfg, key) for key in IDENTITY},
        "the model's architecture": architecture,
        DATA: data_fingerprint,
    }


def copy_overlap(into: Tensor, begin: int, saved: Tensor, at: int) -> None:
    """Copy to `into`, which are elements of a row from `begin` on, what `saved`, from `at` on, has of the same ones."""
    first, last = max(begin, at), min(begin + len(into), at + len(saved))
    if first < last:
        into[first - begin : last - begin] = saved[first - at : last - at]


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`; None if it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("crc32") != _checksum(manifest):
            return f"{MANIFEST} has another checksum than when it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST} in it"
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
    for name, found in _fingerprints(folder, manifest["files"]).items():
        if found != manifest["files"][name]:
            return f"{name} has another checksum than when it was written"
    return None


def _fingerprints(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """By name, for several files at a time: a large checkpoint is several GB per rank."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: _fingerprint(folder / name), names), strict=True))


def _discard(folder: Path) -> None:
    """Remove a checkpoint; of one that was moved to another disk and linked, only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(manifest: dict) -> int:
    return zlib.crc32(json.dumps(manifest).encode())


def _fingerprint(path: Path) -> dict:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}
