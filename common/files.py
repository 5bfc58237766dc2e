"""Files that are written atomically, and removal that leaves links and mount points in place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from common.errors import UserError


def cache_folder() -> Path:
    """Where what is made once is kept, below HF_HOME (~/.cache/huggingface); it may not be there yet."""
    from huggingface_hub import constants  # here: the settings are read before any library

    return Path(constants.HF_HOME) / "multi-gpu-fine-tuning"


def check_writable(output_dir: str) -> None:
    """Make the folder if it is not there. Raises `UserError` if files cannot be written to it."""
    probe = Path(output_dir) / ".writing-probe"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may try, too
    except OSError as error:
        raise UserError(f"output_dir={output_dir}: cannot be written: {error.strerror}") from None


def write_whole(path: Path, text: str) -> None:
    """Write `text` so that `path` holds all of it or what it held before, also on a full disk; a link stays a link."""
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several processes may write the same
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` with `write_whole`, as indented JSON."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; nothing there: do nothing.

    A link to a folder, and a folder that is a mount point, are emptied and stay: that is where the user wants the data.
    So does a link to what is not there yet.
    """
    if not path.exists():
        return
    if not path.is_dir():
        path.unlink()
    elif path.is_symlink() or path.is_mount():
        for child in path.iterdir():
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    else:
        shutil.rmtree(path)
