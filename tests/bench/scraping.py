"""The cost of observability: scrapes, and the overhead of each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from prometheus_client import CollectorRegistry

from service.api.asgi import RequestMiddleware
from service.domain.tasks import Kind
from service.domain.tenants import Registry, Tenant
from service.telemetry.logging import configure_logging
from service.telemetry.metrics import Metrics, Port, ReadSource
from service.telemetry.redaction import Redactor
from tests.bench.figures import Figure
from tests.bench.gateway import BenchGateway, run_bench_gateway
from tests.process.sandbox import ADMIN_TOKEN
from tests.support.images import make_png

TENANTS = 200
SCRAPES = 40
READS = 3_000
REQUESTS = 20_000
ROUNDS = 5
_CONCURRENCY = 8
_LIMITS = [{"window": "day", "tasks": 1_000, "money": 100}, {"window": "month", "tasks": 10_000}]


async def scraping() -> Sequence[Figure]:
    """Duration of a scrape with 200 tenants of every kind, and its effect on reads."""
    async with run_bench_gateway(
        role="all", latency=0, state="Failed", GATEWAY_POLL_SECONDS="0.1", GATEWAY_ADMIN_TOKEN=ADMIN_TOKEN
    ) as work:
        tokens = await _create_tenants(work)
        task = await _submit_all_kinds(work, tokens)
        alone = await _time_reads(work, tokens[0], task)
        scrapes = [await _time_scrape(work) for _ in range(SCRAPES)]
        busy: list[float] = []
        async with _scrape_continuously(work, busy):
            beside = await _time_reads(work, tokens[0], task)
        lines = (await work.http.get(work.metrics_url)).text.count("\n")
    return [
        Figure("a scrape: lines", lines, ""),
        Figure("a scrape: median", median(scrapes) * 1000, "ms", target=100),
        Figure("a scrape: longest", max(scrapes) * 1000, "ms"),
        Figure("a scrape while tasks are read without a pause: median", median(busy) * 1000, "ms"),
        Figure("a read of a task, without scrapes: 99 of 100", _p99(alone) * 1000, "ms"),
        Figure("a read of a task, scrapes without a pause: 99 of 100", _p99(beside) * 1000, "ms"),
    ]


async def _create_tenants(work: BenchGateway) -> list[str]:
    """Create tenants with limits; returns their tokens."""
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    prices = {"max_price": {str(kind): 0.5 for kind in Kind}}
    account = f"{work.gateway.ops_url}/admin/v1/accounts/demo"
    (await work.http.put(account, headers=headers, json=prices)).raise_for_status()
    tokens = []
    for number in range(TENANTS):
        url = f"{work.gateway.ops_url}/admin/v1/tenants/tenant-{number:03}"
        body = {"accounts": ["demo"], "limits": _LIMITS, "max_active": 100}
        (await work.http.put(url, headers=headers, json=body)).raise_for_status()
        created = await work.http.post(f"{url}/tokens", headers=headers, json={})
        tokens.append(created.raise_for_status().json()["token"])
    return tokens


async def _submit_all_kinds(work: BenchGateway, tokens: Sequence[str]) -> str:
    """Submit every kind for every tenant and wait for the ends; returns one of the tasks."""
    gate = asyncio.Semaphore(_CONCURRENCY)

    async def one(token: str, kind: Kind) -> str:
        async with gate:
            headers = {"Authorization": f"Bearer {token}", "Prefer": "wait=30"}
            files = {"image": ("a.png", make_png(), "image/png")}
            answer = await work.http.post(f"{work.gateway.url}/v1/tasks/{kind}", headers=headers, files=files)
            return str(answer.raise_for_status().json()["id"])

    return (await asyncio.gather(*(one(token, kind) for token in tokens for kind in Kind)))[0]


async def _time_reads(work: BenchGateway, token: str, task: str) -> list[float]:
    """Return the durations of successive reads of a task."""
    headers, taken = {"Authorization": f"Bearer {token}"}, []
    for _ in range(READS):
        started_at = time.perf_counter()
        (await work.http.get(f"{work.gateway.url}/v1/tasks/{task}", headers=headers)).raise_for_status()
        taken.append(time.perf_counter() - started_at)
    return taken


async def _time_scrape(work: BenchGateway) -> float:
    started_at = time.perf_counter()
    (await work.http.get(work.metrics_url)).raise_for_status()
    return time.perf_counter() - started_at


@asynccontextmanager
async def _scrape_continuously(work: BenchGateway, taken: list[float]) -> AsyncIterator[None]:
    """Scrape continuously within the block."""

    async def scrape() -> None:
        while True:
            taken.append(await _time_scrape(work))

    scraper = asyncio.create_task(scrape())
    try:
        yield
    finally:
        scraper.cancel()
        await asyncio.wait([scraper])


def _p99(taken: Sequence[float]) -> float:
    return quantiles(taken, n=100)[98]


async def request_overhead() -> Sequence[Figure]:
    """Overhead of metrics, timing and logging for a request."""
    with Path("/dev/null").open("wb") as nowhere:
        logger = configure_logging(json=True, level="info", stream=nowhere, redactor=Redactor())
        metrics = Metrics(CollectorRegistry())
        metrics.label_names.read_registry = lambda: Registry(tenants={"shop": Tenant(1, "shop", ())})
        edge = RequestMiddleware(_app, metrics, logger, Port.TENANTS)
        bare = min([await _time_request(_app) for _ in range(ROUNDS)])
        complete = min([await _time_request(edge) for _ in range(ROUNDS)])
    return [
        Figure("metrics of a read, of a task", min(_time_metrics(metrics) for _ in range(ROUNDS)), "us"),
        Figure("overhead of a request: id, log line and metrics", complete - bare, "us", target=50),
    ]


async def _app(scope: Any, _receive: Any, send: Any) -> None:
    scope["path_template"] = "/v1/tasks/{task_id}"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b"{}", "more_body": False})


async def _time_request(app: Any) -> float:
    """Return the microseconds of a request to an application."""

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_message: Any) -> None:
        pass

    headers = [(b"host", b"localhost"), (b"authorization", b"Bearer t"), (b"accept", b"*/*")]
    started_at = time.perf_counter()
    for _ in range(REQUESTS):
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/tasks/t",
            "headers": headers,
            "state": {"tenant": "shop"},
        }
        await app(scope, receive, send)
    return (time.perf_counter() - started_at) / REQUESTS * 1e6


def _time_metrics(metrics: Metrics) -> float:
    """Return the microseconds of the metrics alone."""
    started_at = time.perf_counter()
    for _ in range(REQUESTS):
        with metrics.track_request(Port.TENANTS):
            metrics.task_reads.labels(ReadSource.MEMORY).inc()
        metrics.record_request(Port.TENANTS, "GET", "/v1/tasks/{task_id}", 200, 0.001)
    return (time.perf_counter() - started_at) / REQUESTS * 1e6
