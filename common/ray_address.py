"""RAY_ADDRESS: the cluster to join, and one line about why that did not work. Knows the address only, not Ray."""

from __future__ import annotations

import os
import socket

from common.errors import UserError

CONNECT_SECONDS = 20


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
        except (OSError, ValueError) as error:
            raise UserError(
                f"RAY_ADDRESS={address}: no cluster answers there ({error}); `ray start --head` prints the address. "
                f"Without RAY_ADDRESS, a cluster of this machine is started"
            ) from None


def not_joined(address: str, error: Exception) -> UserError:
    """What to raise where something listens at `address`, and Ray could not join it."""
    return UserError(
        f"RAY_ADDRESS={address}: no cluster answers there: {str(error).splitlines()[0]}. If `ray start` spoke of "
        f"token authentication, set RAY_AUTH_MODE=token, and on another machine copy ~/.ray/auth_token to it"
    )
