"""Time spent waiting for the upstream."""

from __future__ import annotations

import asyncio

import pytest

from service.telemetry import logging
from service.telemetry.logging import WaitTimer, upstream_wait


class ManualClock:
    def __init__(self) -> None:
        self.now_seconds = 0.0

    def __call__(self) -> float:
        return self.now_seconds


def test_no_wait_has_no_duration() -> None:
    assert WaitTimer().seconds is None


def test_concurrent_waits_count_once() -> None:
    clock = ManualClock()
    timer = WaitTimer(clock)
    timer.start()
    clock.now_seconds = 1
    timer.start()
    clock.now_seconds = 3
    timer.stop()
    clock.now_seconds = 4
    assert timer.seconds == 4
    timer.stop()
    clock.now_seconds = 9
    timer.start()
    clock.now_seconds = 10
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


def test_waits_outside_of_requests() -> None:
    with pytest.raises(ValueError, match="mine"), upstream_wait():
        raise ValueError("mine")
