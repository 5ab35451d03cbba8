"""What was begun is finished, whoever has stopped waiting for it."""

from __future__ import annotations

import asyncio
import gc

import pytest

from service.usecases.background import TaskSupervisor, cancel_and_wait


async def test_outlives_who_waits() -> None:
    """Work goes on when whoever awaited it through a shield is cancelled."""
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


async def test_drains_what_running_work_starts() -> None:
    """The wait at the end is also for what is started during it."""
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


async def test_cuts_short() -> None:
    """What has not ended in time is cancelled, and so is what it starts on being cancelled."""
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


async def test_nothing_to_drain() -> None:
    """Where nothing runs there is nothing to wait for."""
    background = TaskSupervisor()
    assert await background.drain(5) == 0
    await background.spawn(asyncio.sleep(0))
    assert await background.drain(0) == 0


async def test_lost_cancellation() -> None:
    """A task that loses its cancellation, as `asyncio.wait_for` can, is cancelled again until it ends."""
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


async def test_failure_after_the_caller_left(caplog: pytest.LogCaptureFixture) -> None:
    """Work that fails once nobody waits for it any more is not reported as a fault of the event loop."""
    background, go = TaskSupervisor(), asyncio.Event()

    async def work() -> None:
        await go.wait()
        raise ValueError("told to nobody")

    waiting = asyncio.create_task(asyncio.wait_for(asyncio.shield(background.spawn(work())), 5))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go.set()
    assert await background.drain(5) == 0
    gc.collect()
    assert caplog.records == []
