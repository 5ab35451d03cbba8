"""Supervision of background tasks."""

from __future__ import annotations

import asyncio
import gc

import pytest

from service.usecases.background import TaskSupervisor, cancel_and_wait


async def test_work_outlives_a_cancelled_caller() -> None:
    background, go, done = TaskSupervisor(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await go.wait()
        done.set()

    waiting = asyncio.create_task(asyncio.wait_for(asyncio.shield(background.spawn(work())), 5))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go.set()
    assert await background.drain(5) == 0
    assert done.is_set()


async def test_drain_includes_tasks_started_meanwhile() -> None:
    background, go, done = TaskSupervisor(), asyncio.Event(), asyncio.Event()

    async def later() -> None:
        await asyncio.sleep(0)
        done.set()

    async def work() -> None:
        await go.wait()
        background.spawn(later())

    background.spawn(work())
    draining = asyncio.create_task(background.drain(5))
    await asyncio.sleep(0)
    go.set()
    assert await draining == 0
    assert done.is_set()


async def test_drain_cancels_after_the_timeout() -> None:
    background, cancelled = TaskSupervisor(), []

    async def work(name: str) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(name)
            if name == "first":
                background.spawn(work("second"))
                await asyncio.sleep(0)
            raise

    background.spawn(work("first"))
    await asyncio.sleep(0)
    assert await background.drain(0) == 2
    assert cancelled == ["first", "second"]


async def test_drain_without_tasks() -> None:
    background = TaskSupervisor()
    assert await background.drain(5) == 0
    await background.spawn(asyncio.sleep(0))
    assert await background.drain(0) == 0


async def test_swallowed_cancellation_is_repeated() -> None:
    """`asyncio.wait_for` can lose a cancellation."""
    lost = 0

    async def deaf() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                lost += 1
                if lost == 2:
                    raise

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    await cancel_and_wait([task], retry_seconds=0.01)
    assert (task.cancelled(), lost) == (True, 2)


async def test_failure_without_a_caller_is_not_reported_by_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    background, go = TaskSupervisor(), asyncio.Event()

    async def work() -> None:
        await go.wait()
        raise ValueError("without a caller")

    waiting = asyncio.create_task(asyncio.wait_for(asyncio.shield(background.spawn(work())), 5))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go.set()
    assert await background.drain(5) == 0
    gc.collect()
    assert caplog.records == []
