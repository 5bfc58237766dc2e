"""RAY_ADDRESS: the cluster to join, and one line about why that did not work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

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
            # Ray's own client would try for 10 minutes where something else listens. Other troubles it tells by itself.
            ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
            subprocess.run(ask, capture_output=True, timeout=ANSWER_SECONDS)
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            why = f"silent for {ANSWER_SECONDS} seconds" if isinstance(error, subprocess.TimeoutExpired) else error
            raise UserError(
                f"RAY_ADDRESS={address}: no cluster answers there ({why}); `ray start --head` prints the address. "
                f"Without RAY_ADDRESS, a cluster of this machine is started"
            ) from None


def not_joined(address: str, error: Exception) -> UserError:
    """What to raise where something listens at `address`, and Ray could not join it."""
    return UserError(
        f"RAY_ADDRESS={address}: could not be joined: {' '.join(str(error).split()) or type(error).__name__}. If "
        f"`ray start` spoke of token authentication, set RAY_AUTH_MODE=token, and on another machine copy "
        f"~/.ray/auth_token to it"
    )
