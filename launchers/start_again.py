"""For a script that was started with a Python that lacks a package: start it again with the one of `launch.sh`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

SHELL = 'set -euo pipefail; source "$0"; exec python "$@"'


def start_again(error: ModuleNotFoundError, **variables: str) -> NoReturn:
    """Run the script instead of this process with what `environment.sh` finds or builds; `variables` are for it.

    Raises `error` if that has been done already.
    """
    if "STARTED_AGAIN" in os.environ:
        raise error
    script, shell = Path(sys.argv[0]).resolve(), Path(__file__).with_name("environment.sh")
    variables |= {"folder": str(script.parent), "also_needed": str(error.name).partition(".")[0], "STARTED_AGAIN": "1"}
    command = ["bash", "-c", SHELL, str(shell), str(script), *sys.argv[1:]]
    os.execvpe("bash", command, os.environ | variables)
