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

    Under a launcher every rank meets the same mistake. Rank 0 speaks at once; another rank waits until the launcher
    has ended it, and speaks only if nobody did, because then the mistake is its own (its disk, its GPU).
    """
    try:
        sys.exit(main() or 0)
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank != 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        where = f"rank {rank}: " if rank else ""
        print(f"\nerror: {where}{error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # A launcher's other ranks may be inside a collective; leaving without the interpreter's tidy-up cannot hang.
        os._exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr, flush=True)
        os._exit(130)
