"""Work that has to be finished whether or not anybody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

_log = structlog.get_logger(__name__)

T = TypeVar("T")


class Background:
    """Keeps hold of tasks until they are done, so that none is lost when its request goes away."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start `work`; it is not cancelled with whoever awaits it through `asyncio.shield`."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def drain(self, seconds: float) -> int:
        """Wait up to `seconds` for what is running and what that starts, then cancel the rest.

        The number of those that had to be cancelled.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while self._running and (left := end - clock()) > 0:
            await asyncio.wait(self._running, timeout=left)
        cancelled: set[asyncio.Task[Any]] = set()
        while self._running:
            pending = tuple(self._running)
            cancelled.update(pending)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        if cancelled:
            _log.error("background.cut-short", count=len(cancelled))
        return len(cancelled)
