"""Memory and latency of many waiting clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from statistics import quantiles
from urllib.parse import urlsplit

from service.domain.tasks import Task
from service.usecases.ports import CheckOutcome, CheckResult, ClaimedCheck
from tests.bench.figures import Figure
from tests.bench.gateway import BenchGateway, run_bench_gateway

WAITERS = 5_000
TASKS = 500
ENDS_PER_SECOND = 25
"""With ten clients a task, 250 clients are answered each second."""
_CONNECT_CONCURRENCY = 200


async def waiting() -> Sequence[Figure]:
    """5,000 clients, each on its own connection, wait for 500 tasks whose ends another process records."""
    async with run_bench_gateway(role="api", latency=0) as work:
        tasks = await work.submit(TASKS)
        before = work.resident_mib
        gate, ended = asyncio.Semaphore(_CONNECT_CONCURRENCY), dict[str, float]()
        clients = [asyncio.create_task(_wait_for_task(work, tasks[n % TASKS], gate)) for n in range(WAITERS)]
        await work.wait_for_waiters(WAITERS)
        during = work.resident_mib
        for task in tasks:
            started_at = time.monotonic()
            check = CheckResult(outcome=CheckOutcome.SUCCEEDED)
            assert await work.tasks.record_check(ClaimedCheck(task, task.created_at, task.created_at), check)
            ended[task.id] = time.monotonic()
            await asyncio.sleep(1 / ENDS_PER_SECOND - (ended[task.id] - started_at))
        answers = await asyncio.gather(*clients)
        after = work.resident_mib
    cuts = quantiles(((at - ended[task]) * 1000 for task, at in answers), n=100)
    return [
        Figure("clients answered with the end", len(answers), ""),
        Figure("memory of the process before", before, "MiB"),
        Figure("memory of the process while they wait", during, "MiB"),
        Figure("memory of the process after", max(during, after), "MiB", target=300),
        Figure("from the recorded end to the answer: median", cuts[49], "ms", target=50),
        Figure("from the recorded end to the answer: 99 of 100", cuts[98], "ms", target=50),
    ]


async def _wait_for_task(work: BenchGateway, task: Task, gate: asyncio.Semaphore) -> tuple[str, float]:
    """Wait for a task; returns its id and the time of the response."""
    url = urlsplit(work.gateway.url)
    async with gate:
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
    lines = (
        f"GET /v1/tasks/{task.id} HTTP/1.1",
        *("Host: gateway", f"Authorization: Bearer {work.gateway.token}", "Prefer: wait=60", "", ""),
    )
    writer.write("\r\n".join(lines).encode())
    head = await reader.readuntil(b"\r\n\r\n")
    at = time.monotonic()
    (length,) = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    assert b'"state":"succeeded"' in await reader.readexactly(length)
    writer.close()
    return task.id, at
