"""The share of the event loop that background work may take from requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")
MIN_SHARE = 0.15
"""Share of the loop for background work that no request can take."""
MAX_BUSY = 0.6
"""Share of the loop up to which background work fills what requests leave."""
MEASURED_SECONDS = 0.25
_MAX_CREDIT_SECONDS = 0.05


class _MeasuredWork(Coroutine[Any, Any, Any]):
    """A coroutine whose steps add their duration to that of a LoopShare."""

    __slots__ = ("_share", "_work")

    def __init__(self, work: Coroutine[Any, Any, Any], share: LoopShare) -> None:
        self._work = work
        self._share = share

    def send(self, value: Any) -> Any:
        started_at = time.perf_counter()
        try:
            return self._work.send(value)
        finally:
            self._share.used_seconds += time.perf_counter() - started_at

    def throw(self, *error: Any) -> Any:
        return self._work.throw(*error)

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise TypeError("only a task can run measured work")


class LoopShare:
    """Measures how long background work occupies the event loop, and delays it while requests need the loop.

    The work gets what requests leave of the loop up to MAX_BUSY, but MIN_SHARE at least. `overhead` is the time that
    the loop and the connections take for it, as a multiple of what its own steps take.
    """

    def __init__(
        self,
        overhead: float = 1.0,
        *,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self.used_seconds = 0.0
        self.used_share = 0.0
        """The share that the work took in the last interval of MEASURED_SECONDS."""
        self._overhead = overhead
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._allowed = MAX_BUSY
        self._credit_seconds = 0.0
        self._seen = self._interval_start = clock(), 0.0, cpu_clock()

    def measure(self, work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """Return `work` for a task, so that its steps are measured."""
        return _MeasuredWork(work, self)

    def delay_seconds(self) -> float:
        """Return how long to wait before more work begins."""
        now, used, cpu = current = self._clock(), self.used_seconds * self._overhead, self._cpu_clock()
        began_at, used_before, cpu_before = self._interval_start
        if (elapsed := now - began_at) >= MEASURED_SECONDS:
            self.used_share = min((used - used_before) / elapsed, 1.0)
            busy_share = (cpu - cpu_before) / elapsed
            self._allowed = max(MIN_SHARE, MAX_BUSY - max(busy_share - self.used_share, 0.0))
            self._interval_start = current
        seen_at, used_then, _ = self._seen
        earned = (now - seen_at) * self._allowed - (used - used_then)
        self._credit_seconds = min(self._credit_seconds + earned, _MAX_CREDIT_SECONDS)
        self._seen = current
        return max(-self._credit_seconds / self._allowed, 0.0)
