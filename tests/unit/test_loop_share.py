"""The share of the event loop that checks may take."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from service.usecases.loop_share import MAX_BUSY, MEASURED_SECONDS, MIN_SHARE, LoopShare

pytestmark = pytest.mark.smoke


@dataclass
class Loop:
    """A loop on which work and requests take turns."""

    now: float = 0.0
    busy: float = 0.0

    def run(self, share: LoopShare, *, requests: float, overhead: float = 1.0) -> float:
        """Work whenever that is permitted, beside requests that take a share of the rest; return its share."""
        worked = 0.0
        for _ in range(20_000):
            step = 0.0 if share.delay_seconds() else 0.001
            share.used_seconds += step / overhead
            worked += step
            self.now += 0.001
            self.busy += step or 0.001 * requests
        return worked / 20


@pytest.mark.parametrize(("requests", "expected"), [(0.0, MAX_BUSY), (0.5, 0.2), (1.0, MIN_SHARE)])
def test_work_gets_what_requests_leave(requests: float, expected: float) -> None:
    loop = Loop()
    share = LoopShare(2.0, clock=lambda: loop.now, cpu_clock=lambda: loop.busy)
    assert loop.run(share, requests=requests, overhead=2.0) == pytest.approx(expected, abs=0.03)
    assert share.used_share == pytest.approx(expected, abs=0.03)


def test_idle_time_gives_credit_for_one_batch_only() -> None:
    loop = Loop()
    share = LoopShare(clock=lambda: loop.now, cpu_clock=lambda: loop.busy)
    loop.now += 60
    assert share.delay_seconds() == 0
    share.used_seconds += 2 * MEASURED_SECONDS
    assert share.delay_seconds() > MEASURED_SECONDS


async def test_steps_are_measured_and_waits_are_not() -> None:
    share, may_go_on = LoopShare(), asyncio.Event()

    async def work() -> str:
        try:
            await may_go_on.wait()
        except asyncio.CancelledError:
            return "cancelled"
        return "done"

    for cancels, expected in ((False, "done"), (True, "cancelled")):
        may_go_on.clear()
        running = asyncio.create_task(share.measure(work()))
        await asyncio.sleep(0)
        used = share.used_seconds
        assert used > 0
        await asyncio.sleep(0)
        assert share.used_seconds == used
        if cancels:
            running.cancel()
        else:
            may_go_on.set()
        assert await running == expected
