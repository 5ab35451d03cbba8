"""What it costs to watch many tasks, and how late they are checked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from statistics import quantiles

from tests.bench.figures import Figure
from tests.bench.gateway import bench

TASKS = 2_000
POLL_SECONDS = 2.5
LATENCY = 0.05
SETTLING_SECONDS = 10.0
SECONDS = 20.0


async def watching() -> Sequence[Figure]:
    """2,000 running tasks that somebody looks at, watched by one process every 2.5 s, at an upstream 50 ms away."""
    async with bench(role="all", latency=LATENCY) as work:
        await work.submit(TASKS)
        await asyncio.sleep(SETTLING_SECONDS)
        url = f"{work.upstream}/lateness/{POLL_SECONDS * 1000}"
        await work.http.get(url)
        begun, used = time.monotonic(), work.cpu_seconds
        await asyncio.sleep(SECONDS)
        share = (work.cpu_seconds - used) / (time.monotonic() - begun)
        late: list[float] = (await work.http.get(url)).json()
    cuts = quantiles(late, n=100)
    return [
        Figure("checks per second", len(late) / SECONDS, "/s"),
        Figure("share of a core", share * 100, "%", most=50),
        Figure("a check, of a core", share / (len(late) / SECONDS) * 1e6, "us"),
        Figure("lateness of a check: median", cuts[49], "ms"),
        Figure("lateness of a check: 99 of 100", cuts[98], "ms", most=1_000),
    ]
