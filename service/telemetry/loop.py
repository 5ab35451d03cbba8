"""How late the process gets to what it wanted to do, since it was doing something else."""

from __future__ import annotations

import asyncio

from service.telemetry.metrics import Metrics

INTERVAL = 1.0


class LoopLag:
    """Measures it once a second: a sample that is seldom but by nothing else than the clock."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + INTERVAL
            await asyncio.sleep(INTERVAL)
            self._metrics.loop_lag(max(loop.time() - due, 0.0))
