"""The `composer` launcher, which waits for a checkpoint when it is stopped, and adds nothing to a rank's error line.

`python composer_launcher.py [options] SCRIPT [arguments]` takes what `composer` takes and is the same launcher. By
itself it leaves the training running when it is ended by SIGTERM, gives it 30 seconds after Ctrl-C, too few for a
checkpoint, and reports a failed rank with a page of its output.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import timedelta

import psutil

from common import errors, launched

PATIENCE = timedelta(minutes=5)


def training_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.is_running()]


def print_failure(rank: int, process: subprocess.Popen) -> None:
    """What a rank other than the first printed last; the first rank's lines are on the screen already."""
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.seek(0)
            lines = stream.read().splitlines()
            starts = [i for i, line in enumerate(lines) if line.startswith(("error:", "Traceback"))]
            if starts:
                print("\n".join(lines[starts[0] :]), file=sys.stderr, flush=True)


def main() -> None:
    stopped_by = 0

    def stop(number: int, frame: object) -> None:
        nonlocal stopped_by
        again, stopped_by = stopped_by == signal.SIGINT == number, number
        for process in training_processes():
            process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    launched.forget()
    from composer.cli import launcher  # Composer reads the variables of a launch as it is imported

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):  # as nohup sets it
            signal.signal(number, stop)
    launcher.CLEANUP_TIMEOUT = PATIENCE
    launcher.get_free_tcp_port = launched.free_port
    launcher._print_process_exit_status = print_failure
    launcher.print = lambda *words: None  # "Waiting up to 300 seconds ..."
    launcher.log.disabled = True
    # A group of their own: Ctrl-C in a terminal would otherwise reach every rank at once, in addition to our SIGTERM.
    popen = subprocess.Popen
    launcher.subprocess.Popen = lambda *arguments, **options: popen(*arguments, process_group=0, **options)
    code = launcher.main()
    sys.stdout.flush()
    os._exit(128 + stopped_by if stopped_by else code if code >= 0 else 128 - code)


if __name__ == "__main__":
    errors.run(main)
