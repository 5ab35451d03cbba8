"""How long a request waited for the upstream.

What a request waits for is done in other tasks too, some of which it shares with other requests. So each of them marks
where it waits (`waiting`), and what belongs to the request finds it by its context, which tasks take over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Spent:
    """Adds up the time in which at least one wait was under way: what waits at once counts once."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._under_way = 0
        self._since = 0.0
        self._before: float | None = None

    @property
    def seconds(self) -> float | None:
        """How much it is by now; None if there was no wait."""
        if not self._under_way:
            return self._before
        return (self._before or 0.0) + self._clock() - self._since

    def begin(self) -> None:
        """A wait begins."""
        if not self._under_way:
            self._since = self._clock()
        self._under_way += 1

    def end(self) -> None:
        """A wait ends."""
        if self._under_way == 1:
            self._before = self.seconds
        self._under_way -= 1


_SPENT: ContextVar[Spent | None] = ContextVar("spent", default=None)


@contextmanager
def counted() -> Iterator[Spent]:
    """Count what is waited within the block, and in the tasks that are begun in it."""
    spent = Spent()
    reset = _SPENT.set(spent)
    try:
        yield spent
    finally:
        _SPENT.reset(reset)


@contextmanager
def waiting() -> Iterator[None]:
    """Within the block the upstream is waited for; nothing is counted where no request is."""
    spent = _SPENT.get()
    if spent is None:
        yield
        return
    spent.begin()
    try:
        yield
    finally:
        spent.end()
