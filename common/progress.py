"""How far a long loop has come: a bar on a terminal, a line every few seconds anywhere else, both on stdout."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

EVERY_SECONDS = 5.0
MOST_SECONDS = 60.0  # between two lines of a run that takes hours
Item = TypeVar("Item")


def shows_bars() -> bool:
    """Whether stdout ends in something that can redraw a line: a terminal, or a notebook, which sets PROGRESS=bar."""
    return os.environ.get("PROGRESS") == "bar" or sys.stdout.isatty()


class Progress:
    """`total` steps, of which `done` were made before; `unit` names one of them.

    On a terminal a bar, which is taken away at the end unless `keep` is set. Elsewhere a line with the time that is
    left, for the first step and then every few seconds; a loop that takes less prints its last one only if `keep` is
    set.
    """

    def __init__(self, name: str, unit: str, total: int, done: int = 0, *, keep: bool = True, shown: bool = True):
        self._name, self._unit, self._total, self._done, self._keep = name, unit, total, done, keep
        self._shown = shown and done < total
        self._began = self._printed = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first update came, and how many it counted
        self._bar = None
        if self._shown and shows_bars():
            # A terminal that does not know its size has no room at all for tqdm, which would print nothing.
            size = {"dynamic_ncols": True} if _knows_its_size() else {"ncols": 80, "nrows": 24}
            self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, leave=keep, file=sys.stdout, **size)

    def update(self, figures: str = "") -> None:
        """One more step; `figures` is what to show of it."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update()
        elif self._shown:
            self._print_line(figures)

    def write(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def show(self, figures: str) -> None:
        """Replace a bar's figures between two steps."""
        if self._bar is not None:
            self._bar.set_postfix_str(figures)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _print_line(self, figures: str) -> None:
        now = time.monotonic()
        begins = self._first is None
        self._first = self._first or (now, self._done)
        pause = min(MOST_SECONDS, max(EVERY_SECONDS, (now - self._began) / 100))
        ends = self._done >= self._total
        if not ((begins or ends) and self._keep) and now - self._printed < pause:
            return
        self._printed = now
        since, at = self._first  # the first step is left out of the speed: it compiles and fills caches
        left = (self._total - self._done) * (now - since) / (self._done - at) if self._done > at else None
        words = [f"{self._name}: {self._done / self._total:.0%} ({self._done:,} of {self._total:,} {self._unit}s)"]
        words += [figures] if figures else []
        words += [f"{tqdm.format_interval(left)} left"] if left is not None and not ends else []
        print(*words, sep=", ", flush=True)


def _knows_its_size() -> bool:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def track(items: Iterable[Item], name: str, unit: str, total: int, *, shown: bool = True) -> Iterator[Item]:
    """`items`, with their progress while they are used."""
    progress = Progress(name, unit, total, keep=False, shown=shown)
    for item in items:
        yield item
        progress.update()
    progress.close()
