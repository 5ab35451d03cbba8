"""Supervised background tasks and periodic jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextvars import Context
from typing import Any, NoReturn, TypeVar

import structlog

from service.domain.errors import LedgerUnavailable

_log = structlog.get_logger(__name__)


T = TypeVar("T")


CANCEL_RETRY_SECONDS = 1.0


async def cancel_and_wait(tasks: Iterable[asyncio.Task[Any]], *, retry_seconds: float = CANCEL_RETRY_SECONDS) -> None:
    """Cancel tasks and wait for their end.

    They are cancelled again until they have ended: a cancellation that comes just as what a task waits for is done is
    lost in `asyncio.wait_for` before Python 3.12 (https://github.com/python/cpython/issues/86296), through which every
    command to Redis goes.
    """
    tasks = set(tasks)
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=retry_seconds)
    await asyncio.gather(*tasks, return_exceptions=True)  # nobody else asks how they ended


class TaskSupervisor:
    """Keeps hold of tasks until they are done, so that none is lost when its request goes away."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T], *, detached: bool = False) -> asyncio.Task[T]:
        """Start `work`; it is not cancelled with whoever awaits it through `asyncio.shield`.

        It belongs to the request that starts it, in the log and in traces, unless it is set `apart`.
        """
        task = Context().run(asyncio.create_task, work) if detached else asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever awaited it may have left, and what went wrong was dealt with in it

    async def drain(self, seconds: float) -> int:
        """Wait up to `seconds` for what is running and what that starts, then cancel the rest.

        The number of those that had to be cancelled.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while self._tasks and (left := end - clock()) > 0:
            await asyncio.wait(self._tasks, timeout=left)
        cancelled: set[asyncio.Task[Any]] = set()
        while self._tasks:
            pending = tuple(self._tasks)
            cancelled.update(pending)
            await cancel_and_wait(pending)
        if cancelled:
            _log.error("shutdown.tasks_cancelled", count=len(cancelled))
        return len(cancelled)


IDLE_SECONDS = 0.25
"""How long a round waits that found nothing more to do. What is due is late by at most this."""


UNAVAILABLE_SECONDS = 1.0


async def run_periodically(job: str, run_once: Callable[[], Awaitable[bool]]) -> NoReturn:
    """Begin one round after the other until cancelled; `begin` says whether there may be more to do at once.

    Neither the store being away, which is logged elsewhere, nor a fault of ours ends it.
    """
    while True:
        try:
            more = await run_once()
        except LedgerUnavailable:
            await asyncio.sleep(UNAVAILABLE_SECONDS)
        except Exception:  # noqa: BLE001 - one fault must not end all that is to come
            _log.exception("job.error", job=job)
            await asyncio.sleep(UNAVAILABLE_SECONDS)
        else:
            if not more:
                await asyncio.sleep(IDLE_SECONDS)
