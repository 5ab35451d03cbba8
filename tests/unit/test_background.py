"""Supervision of background tasks and jobs, the clock of the ledger, and the timer of waits for the upstream."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from service import container
from service.container import Container
from service.domain.ledger import LedgerClock
from service.settings import Settings
from service.telemetry import logging
from service.telemetry.logging import WaitTimer, upstream_wait
from service.telemetry.metrics import Metrics
from service.usecases.background import TaskSupervisor, cancel_and_wait
from tests.behaviour.gateway_fixture import ENVIRONMENT


@pytest.mark.parametrize("fails", [False, True])
async def test_work_and_what_it_starts_outlive_the_caller(caplog: pytest.LogCaptureFixture, fails: bool) -> None:
    supervisor, go, done = TaskSupervisor(), asyncio.Event(), []

    async def finish() -> None:
        await asyncio.sleep(0)
        done.append(1)

    async def work() -> None:
        await go.wait()
        supervisor.spawn(finish())
        if fails:
            raise ValueError("without a caller")

    waiting = asyncio.create_task(asyncio.wait_for(asyncio.shield(supervisor.spawn(work())), 60))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go.set()
    assert await supervisor.drain(60) == 0
    gc.collect()
    assert done
    assert caplog.records == []


async def test_drain_cancels_after_the_timeout() -> None:
    supervisor, cancelled = TaskSupervisor(), []

    async def work(name: str) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(name)
            if name == "first":
                supervisor.spawn(work("second"))
                await asyncio.sleep(0)
            raise

    supervisor.spawn(work("first"))
    await asyncio.sleep(0)
    assert await supervisor.drain(0) == 2
    assert cancelled == ["first", "second"]
    assert await supervisor.drain(0) == 0


async def test_swallowed_cancellation_is_repeated() -> None:
    """`asyncio.wait_for` can lose a cancellation."""
    lost = 0

    async def deaf() -> None:
        nonlocal lost
        while lost < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                lost += 1
        raise asyncio.CancelledError

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    await cancel_and_wait([task], retry_seconds=0.01)
    assert (task.cancelled(), lost) == (True, 2)


async def test_failed_jobs_are_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "JOB_RESTART_SECONDS", 0)
    begun, third = [], asyncio.Event()

    async def job() -> None:
        begun.append(1)
        if len(begun) == 1:
            raise ValueError("a fault of ours")
        if len(begun) == 3:
            third.set()
            await asyncio.Event().wait()

    names = ("ledger", "tasks", "deliveries", "upstream", "registry", "task_cache", "fetch_artifact", "post_webhook")
    adapters: Any = dict.fromkeys(names)  # which are never called
    settings = Settings.load(ENVIRONMENT | {"GATEWAY_REDIS_URL": "redis://localhost"})
    services = Container(settings, Metrics(CollectorRegistry()), TaskSupervisor(), **adapters)
    services.jobs = [job]
    async with services.run_jobs(), asyncio.timeout(60):
        await third.wait()
    assert len(begun) == 3


START, MINUTE = 1_790_000_000_000, 60_000


def test_clock_slows_down_after_a_step_back() -> None:
    # Nine tenths of the speed, until both clocks agree.
    clock = LedgerClock(START, 0).advance(START - 20 * MINUTE)
    assert clock.last_ms == START
    ahead = clock.advance(START - 10 * MINUTE)
    assert ahead.last_ms == START + 9 * MINUTE
    assert ahead.advance(START + 180 * MINUTE) == LedgerClock(START + 180 * MINUTE, 0)


@given(st.lists(st.integers(-2_000_000, 2_000_000) | st.integers(0, 30)))
def test_clock_never_goes_back(steps: list[int]) -> None:
    wall, clock = START, LedgerClock(START, 0)
    for step in steps:
        wall += step
        after = clock.advance(wall)
        assert after.last_ms >= max(clock.last_ms, wall)
        if step > 0:
            assert after.last_ms - clock.last_ms >= step * 9 // 10
        clock = after


def test_concurrent_waits_count_once() -> None:
    times = iter([0, 4, 9, 10])
    timer = WaitTimer(lambda: float(next(times)))
    assert timer.seconds is None
    timer.start()
    timer.start()
    timer.stop()
    timer.stop()
    timer.start()
    timer.stop()
    assert timer.seconds == 5


async def test_waits_in_child_tasks_count() -> None:
    go = asyncio.Event()

    async def waits() -> None:
        with upstream_wait():
            await go.wait()

    async def request(work: list[asyncio.Task[None]]) -> float | None:
        with logging.measure_upstream_wait() as mine:
            if work:
                return mine.seconds
            work.append(asyncio.create_task(waits()))
            await asyncio.sleep(0)
            go.set()
            await work[0]
            return mine.seconds

    shared: list[asyncio.Task[None]] = []
    first, second = await asyncio.gather(request(shared), request(shared))
    assert first is not None
    assert first > 0
    assert second is None
