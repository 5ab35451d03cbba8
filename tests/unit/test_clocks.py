"""The clock of the ledger, and the timer of waits for the upstream."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from service.domain.ledger import LedgerClock
from service.telemetry import logging
from service.telemetry.logging import WaitTimer, upstream_wait

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
