"""Messages without the passwords of addresses such as postgresql://user:password@host, whatever they consist of."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(\S+)")
_HOST_AND_PORT = re.compile(r"[^/?#@]*:\d*([/?#]|$)")


def without_secrets(text: str) -> str:
    """`text` without the user and password of any address in it.

    An address of the environment is known exactly: also its password with spaces, or the part of it that a library
    quotes. Any other address ends at the first space.
    """
    for secret in _secrets_of_environment():
        text = text.replace(secret, HIDDEN)
    return _ADDRESS.sub(lambda match: match[1] + _split(match[2])[1], text)


def encoded(address: str) -> str:
    """`address` with its user and password percent-encoded, so that every library finds the same host in it."""
    scheme, separator, rest = address.partition("://")
    credentials, host = _split(rest)
    if not separator or not credentials or _HOST_AND_PORT.match(rest):
        return address
    user, colon, password = credentials.partition(":")
    return f"{scheme}://{_encode(user)}{colon}{_encode(password)}@{host}"


def _encode(text: str) -> str:
    return quote(unquote(text), safe="")


def _split(rest: str) -> tuple[str, str]:
    """Credentials, and what follows them, of an address without its scheme.

    A password may hold `/`, `?`, `#` and `@`, so the last `@` ends it. `host/path@version` has no credentials.
    """
    credentials, _, host = rest.rpartition("@")
    before_path = re.split(r"[/?#]", rest, maxsplit=1)[0]
    return (credentials, host) if "@" in before_path or (":" in before_path and credentials) else ("", rest)


def _secrets_of_environment() -> list[str]:
    """Every form in which the password of an address in the environment may be quoted, the longest first."""
    found = set()
    for value in list(os.environ.values()):
        _, _, rest = value.partition("://")
        credentials, _ = _split(rest)
        user, colon, password = credentials.partition(":")
        if not credentials:
            continue
        plain = unquote(password)
        forms = {password, plain, quote(plain), quote(plain, safe=""), quote_plus(plain), repr(plain)[1:-1]}
        # A short one might be part of any word.
        found |= {credentials, *(form if len(form) > 2 or not user else f"{user}{colon}{form}" for form in forms)}
    return sorted((secret for secret in found if len(secret) > 2), key=len, reverse=True)
