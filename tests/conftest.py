"""What several test files share."""

import contextlib
from pathlib import Path

import pytest

from common.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
FAMILIES = ("qwen2", "llama", "opt", "bloom")


@contextlib.contextmanager
def refused(*parts: str):
    """The block must raise a `UserError`: one line, with each of `parts` (key, file, remedy) in it."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message, message
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"
