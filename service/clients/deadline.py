"""A time limit that reads what has arrived before it gives up."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

GRACE_SECONDS = 0.1
"""How long the event loop gets to read what has arrived by the end; longer if it was late for that too."""
MOST_GRACES = 10


class Deadline:
    """As `asyncio.timeout`, but for a process that may be stopped for longer than its timers, or be short of CPU.

    When it goes on, all timers are due at once and run before anything is read: a response that arrived in the meantime
    would be given up unread. So the end is put off until the event loop has had time to read it.
    """

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + seconds
        self._scope = asyncio.timeout(None)
        self._graces = 0
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        self._check_at(self._end)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer:
            self._timer.cancel()
        await self._scope.__aexit__(kind, error, trace)

    @property
    def left(self) -> float:
        """The seconds until its end; never below zero."""
        return max(self._end - self._loop.time(), 0)

    def next_within(self, seconds: float) -> None:
        """End already after so many seconds from now, unless this is called again before."""
        now = self._loop.time()
        if now < self._end:
            self._graces = 0
            self._check_at(min(self._end, now + seconds))

    def _check_at(self, due: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._check, due)

    def _check(self, due: float) -> None:
        now = self._loop.time()
        late = now - due > GRACE_SECONDS
        if self._graces == 0 or (late and self._graces < MOST_GRACES):
            self._graces += 1
            self._check_at(now + GRACE_SECONDS)
        else:
            self._scope.reschedule(now)
