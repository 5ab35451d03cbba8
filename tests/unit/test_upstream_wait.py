"""Time spent waiting for the upstream."""

from __future__ import annotations

import asyncio

import pytest

from service.telemetry import logging
from service.telemetry.logging import WaitTimer, upstream_wait
from tests.unit.fake_gateway import FakeGateway, wait_until


class ManualClock:
    def __init__(self) -> None:
        self.now_seconds = 0.0

    def __call__(self) -> float:
        return self.now_seconds


def test_no_wait_has_no_duration() -> None:
    assert WaitTimer().seconds is None


def test_sequential_waits_add_up() -> None:
    clock = ManualClock()
    counted = WaitTimer(clock)
    for _ in range(2):
        counted.start()
        clock.now_seconds += 3
        counted.stop()
        clock.now_seconds += 100
    assert counted.seconds == 6


def test_concurrent_waits_count_once() -> None:
    clock = ManualClock()
    counted = WaitTimer(clock)
    counted.start()
    clock.now_seconds = 1
    counted.start()
    clock.now_seconds = 3
    counted.stop()
    clock.now_seconds = 4
    assert counted.seconds == 4
    counted.stop()
    clock.now_seconds = 9
    assert counted.seconds == 4


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


def test_waits_outside_of_requests() -> None:
    with pytest.raises(ValueError, match="mine"), upstream_wait():
        raise ValueError("mine")


async def test_shared_query_counts_for_every_waiter() -> None:
    gateway = FakeGateway()
    task = (await gateway.submit_image()).task
    reads = gateway.make_reader(interval=60)
    gateway.ledger.is_unavailable = True
    gateway.upstream.may_respond.clear()

    async def read() -> float:
        with logging.measure_upstream_wait() as mine:
            await reads.read(gateway.tenant, task.id)
            return mine.seconds or 0

    reading = [asyncio.create_task(read()) for _ in range(3)]
    await wait_until(lambda: bool(gateway.upstream.checks))
    gateway.upstream.may_respond.set()
    assert min(await asyncio.gather(*reading)) > 0
    assert len(gateway.upstream.checks) == 1
