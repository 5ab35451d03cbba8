"""Supervised background tasks and periodic jobs."""

from __future__ import annotations

import asyncio
import time
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

    A cancellation that arrives just as `asyncio.wait_for` completes is lost before Python 3.12
    (https://github.com/python/cpython/issues/86296), and every Redis command goes through it: hence the repetition.
    """
    tasks = set(tasks)
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=retry_seconds)
    await asyncio.gather(*tasks, return_exceptions=True)  # their errors are not needed


TURN_SECONDS = 0.0005


async def run_in_turns(steps: Iterable[T]) -> list[T]:
    """Take the steps of a long computation, in turns of TURN_SECONDS; return their results.

    In a thread it would delay the event loop for longer: a thread gives up the interpreter only every 5 ms.
    """
    results, ends_at = [], time.perf_counter() + TURN_SECONDS
    for result in steps:
        results.append(result)
        if time.perf_counter() >= ends_at:
            await asyncio.sleep(0)
            ends_at = time.perf_counter() + TURN_SECONDS
    return results


class TaskSupervisor:
    """Holds tasks until they are done, independent of the requests that started them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T], *, detached: bool = False) -> asyncio.Task[T]:
        """Start `work`, to be awaited through `asyncio.shield`.

        Unless `detached`, it belongs to the current request in logs and traces.
        """
        task = Context().run(asyncio.create_task, work) if detached else asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as retrieved: its caller may be gone, and the task handles its errors

    async def drain(self, seconds: float) -> int:
        """Wait up to `seconds` for tasks and those they start, then cancel the rest; return the number cancelled."""
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
"""Delay after a run that found nothing more to do: due work starts late by at most this."""
UNAVAILABLE_SECONDS = 1.0


async def run_periodically(job: str, run_once: Callable[[], Awaitable[bool]]) -> NoReturn:
    """Run a job until cancelled; `run_once` returns whether to run again at once.

    Errors are logged and the loop continues.
    """
    while True:
        try:
            has_more = await run_once()
        except LedgerUnavailable:
            await asyncio.sleep(UNAVAILABLE_SECONDS)
        except Exception:  # noqa: BLE001 - one error must not end the job
            _log.exception("job.error", job=job)
            await asyncio.sleep(UNAVAILABLE_SECONDS)
        else:
            if not has_more:
                await asyncio.sleep(IDLE_SECONDS)
