"""What a process prints must never end it: not a terminal that is gone, a closed pipe, a full disk or an encoding."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from common.redaction import without_secrets

# What our own lines hold in addition to ASCII, for terminals and files that cannot show it.
PLAIN = {"→": "->", "↓": "v", "↑": "^", "–": "-", "×": "x", "…": "...", "’": "'"}
MOST_SECONDS = 5  # that a line waits for a terminal that takes nothing


class _Descriptor(io.FileIO):
    """A file descriptor whose writes never raise: what cannot be written is dropped."""

    def write(self, data) -> int:
        for _ in range(MOST_SECONDS):
            try:
                written = super().write(data)
                if written is not None:
                    return written
                select.select([], [self], [], 1)  # a non-blocking terminal is full
            except (OSError, ValueError):
                break
        return len(data)


class _Stream(io.TextIOWrapper):
    """Text without secrets, in the encoding of the terminal or file, line by line."""

    def write(self, text: str) -> int:
        super().write(without_secrets(text))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # BlockingIOError is one, too
            super().flush()


def protect_output() -> None:
    """Make `sys.stdout` and `sys.stderr` streams that never raise; a second call does nothing."""
    codecs.register_error("plain", _plain)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # the process was started without it
            _occupy(descriptor)
            setattr(sys, name, _Stream(io.BufferedWriter(_Descriptor(os.devnull, "w")), "utf-8", "plain"))
        elif stream is getattr(sys, f"__{name}__"):  # not one that Ray, pytest or a notebook has put in its place
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            binary = io.BufferedWriter(_Descriptor(descriptor, "w", closefd=False))
            setattr(sys, name, _Stream(binary, stream.encoding, "plain", line_buffering=True))


@contextlib.contextmanager
def output_to(path: Path | None, errors: Path | None = None, terminal: bool = False) -> Iterator[None]:
    """Append what this process prints to `path`, and its stderr to `errors` (None: to `path`); no path: leave it as is.

    `terminal` is whether a terminal shows these files in the end, so that progress bars make sense.
    """
    if path is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        stdout = stack.enter_context(_append_to(path, terminal))
        stderr = stack.enter_context(_append_to(errors, terminal)) if errors else stdout
        stack.enter_context(contextlib.redirect_stdout(stdout))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        yield


def _append_to(path: Path, terminal: bool) -> TextIO:
    stream = _Stream(io.BufferedWriter(_Descriptor(path, "a")), "utf-8", "replace", line_buffering=True)
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    return stream


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in characters), error.end


def _occupy(descriptor: int) -> None:
    """Keep a closed descriptor from going to the next file that is opened, which would get what C code prints."""
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
