"""The cluster of RAY_ADDRESS, or what a cluster of this machine needs; and one line about why that did not work."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

from common.errors import UserError

CONNECT_SECONDS = 20
ANSWER_SECONDS = 40  # of which Ray takes some to be loaded


def joined() -> str:
    """The address of the cluster to join; empty: one is started on this machine."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def check_address(address: str) -> None:
    """Raise `UserError` for an address where nothing listens; what else can be wrong shows when Ray joins."""
    if address.startswith("ray://"):
        raise UserError(f"RAY_ADDRESS={address}: start train.py on a machine of the cluster, with its HOST:6379")
    if address and address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
            # Ray's own client would try for 10 minutes if something else listens. It reports other troubles.
            ask = [sys.executable, "-P", "-m", "ray.scripts.scripts", "health-check", "--address", address]
            subprocess.run(ask, capture_output=True, timeout=ANSWER_SECONDS)
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            why = f"silent for {ANSWER_SECONDS} seconds" if isinstance(error, subprocess.TimeoutExpired) else error
            raise UserError(
                f"RAY_ADDRESS={address}: no cluster answers there ({why}); `ray start --head` prints the address. "
                f"Without RAY_ADDRESS, a cluster of this machine is started"
            ) from None


def worker_environment() -> dict[str, str]:
    """The `runtime_env` of a cluster that is started here: Ray starts workers by a shell, with Python's path unquoted.

    Raises `UserError` for a path that Ray's own parser breaks on as well; its workers would never start.
    """
    for character in "'\"\\":
        if character in sys.executable:
            raise UserError(
                f"Ray starts no workers from a path with {character} in it, and Python's is {sys.executable}: make the "
                f"environment elsewhere, or move the repository"
            )
    quoted = shlex.quote(sys.executable)
    return {"py_executable": quoted} if quoted != sys.executable else {}


@contextlib.contextmanager
def without_hangup() -> Iterator[None]:
    """What starts inside of this never gets SIGHUP.

    A terminal that is lost sends it to all of its processes, and Ray would be gone before the workers have saved.
    """
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def not_joined(address: str, error: Exception) -> UserError:
    """What to raise if something listens at `address`, and Ray could not join it."""
    return UserError(
        f"RAY_ADDRESS={address}: could not be joined: {' '.join(str(error).split()) or type(error).__name__}. If "
        f"`ray start` spoke of token authentication, set RAY_AUTH_MODE=token, and on another machine copy "
        f"~/.ray/auth_token to it"
    )
