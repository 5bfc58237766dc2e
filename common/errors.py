"""One exception for everything that a user can put right, shown as one line and never as a traceback."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable


class UserError(Exception):
    """What was wrong, where (key or file), and what to set instead."""


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and end the process: 0 when it is done, 2 with one `error:` line for a mistake of the user's, 130
    after Ctrl-C.

    Under a launcher every rank meets the same mistake, or meets its echo when rank 0 has left. Rank 0 speaks at once;
    another rank waits until the launcher has ended it, and speaks only if nobody did: then the error is its own.
    """
    try:
        sys.exit(main() or 0)
    except UserError as error:
        rank = _rank()
        if rank and _launcher_has_spoken():
            os._exit(2)  # it is ending this rank because another one met the mistake first
        _wait_for_the_launcher(rank)
        where = f"rank {rank}: " if rank else ""
        print(f"\nerror: {where}{error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # A launcher's other ranks may be inside a collective; leaving without the interpreter's tidy-up cannot hang.
        os._exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr, flush=True)
        os._exit(130)
    except Exception as error:
        if isinstance(error, RuntimeError) and _launcher_has_spoken():
            os._exit(1)  # a collective broke off because another rank has left, and that rank has said why
        _wait_for_the_launcher(_rank())
        raise


def _rank() -> int:
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0  # anything else is what common/launched.py complains about


def _wait_for_the_launcher(rank: int) -> None:
    if rank and not _launcher_has_spoken():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)


def _launcher_has_spoken() -> bool:
    """Whether its SIGTERM has come already, and was only noted by the run's `StopRequest`."""
    return bool(getattr(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), "signal_name", ""))
