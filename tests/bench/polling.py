"""CPU time and lateness of polling many tasks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from statistics import quantiles

from tests.bench.figures import Figure
from tests.bench.gateway import run_bench_gateway

TASKS = 2_000
POLL_SECONDS = 2.5
LATENCY_SECONDS = 0.05
SETTLING_SECONDS = 10.0
MEASURED_SECONDS = 20.0


async def polling() -> Sequence[Figure]:
    """2,000 watched tasks, polled by one process every 2.5 s at an upstream with 50 ms latency."""
    async with run_bench_gateway(role="all", latency=LATENCY_SECONDS) as work:
        await work.submit(TASKS)
        await asyncio.sleep(SETTLING_SECONDS)
        url = f"{work.upstream}/lateness/{POLL_SECONDS * 1000}"
        await work.http.get(url)
        started_at, used = time.monotonic(), work.cpu_seconds
        await asyncio.sleep(MEASURED_SECONDS)
        share = (work.cpu_seconds - used) / (time.monotonic() - started_at)
        late: list[float] = (await work.http.get(url)).json()
    cuts = quantiles(late, n=100)
    return [
        Figure("checks per second", len(late) / MEASURED_SECONDS, "/s"),
        Figure("share of a core", share * 100, "%", target=50),
        Figure("a check, of a core", share / (len(late) / MEASURED_SECONDS) * 1e6, "us"),
        Figure("lateness of a check: median", cuts[49], "ms"),
        Figure("lateness of a check: 99 of 100", cuts[98], "ms", target=1_000),
    ]
