"""One exception for everything that a user can put right, shown as one line and never as a traceback."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common.console import protect_output


class UserError(Exception):
    """What was wrong, where (key or file), and what to set instead."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and everything that it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def full_disk(error: BaseException, folder: Path | None = None) -> UserError | None:
    """One line for an `error` that comes from a full disk, or a quota that is used up; None for any other.

    `folder` is where the program was writing. Libraries report it in many forms: an `OSError`, Rust's text, or the
    archive of `torch.save`, which knows only that a write failed.
    """
    chain = list(causes(error))
    by_number = [e for e in chain if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)]
    text = "\n".join(map(str, chain))
    by_text = re.search(r"No space left on device|Disk quota exceeded|file write failed|inline_container", text)
    if not by_number and not by_text:
        return None
    named = next((Path(e.filename) for e in by_number if isinstance(e.filename, str)), folder)
    place = next((p for p in (named, *(named.absolute().parents if named else ())) if p and p.exists()), Path("/"))
    disk = shutil.disk_usage(place)
    if not by_number and "No space" not in text and "quota" not in text and disk.free > disk.total * 0.01:
        return None  # a write that failed for another reason
    return UserError(
        f"no space left to write {named or 'a file'}: {disk.free / 1e6:,.0f} of {disk.total / 1e6:,.0f} MB are free on "
        f"that disk; make room, or set output_dir to another disk (checkpoint.keep=1 needs the least)"
    )


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and end the process: with what it returns, or as `reported` ends it."""
    gc.freeze()  # what was imported is no garbage
    gc.enable()
    with reported():
        sys.exit(main() or 0)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Run the block; end the process with 2 and one `error:` line after a user error, with 130 after Ctrl-C.

    Under a launcher every rank meets the same mistake, or meets its echo when rank 0 has left. Rank 0 speaks at once;
    another rank waits until the launcher has ended it, and speaks only if nobody did: then the error is its own.
    """
    protect_output()
    try:
        yield
    except Exception as error:
        mistake = error if isinstance(error, UserError) else full_disk(error)
        number = os.environ.get("RANK", "")
        rank = int(number) if number.isdecimal() else 0  # anything else is what common/launched.py complains about
        if _launcher_has_spoken():
            if mistake and rank:
                os._exit(2)  # it is ending this rank because another one met the mistake first
            if not mistake and isinstance(error, RuntimeError):
                os._exit(1)  # a collective broke off because another rank has left, and that rank has printed why
        elif rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        if not mistake:
            raise
        where = f"rank {rank}: " if rank else ""
        print(f"\nerror: {where}{mistake}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # A launcher's other ranks may be inside a collective; leaving without the interpreter's tidy-up cannot hang.
        os._exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr, flush=True)
        os._exit(130)


def _launcher_has_spoken() -> bool:
    """Whether its SIGTERM has come already, and was only noted by the run's `StopRequest`."""
    return bool(getattr(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), "signal_name", ""))
