"""A gateway process with thousands of waiting clients, of polled tasks, and with many tenants that are scraped."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.parse import urlsplit

from httpx2 import AsyncClient
from prometheus_client import CollectorRegistry

from service.api.asgi import RequestMiddleware
from service.domain.tasks import Kind, Task
from service.domain.tenants import Registry, Tenant
from service.storage.connections import connect
from service.storage.redis import Keys, RedisScripts
from service.storage.tasks import RedisTaskStore
from service.telemetry.logging import configure_logging
from service.telemetry.metrics import Metrics, Port, ReadSource
from service.telemetry.redaction import Redactor
from service.usecases.ports import CheckOutcome, CheckResult, ClaimedCheck
from tests.bench.peers.servers import Server
from tests.bench.report import Figure
from tests.bench.upstream import run_upstream
from tests.process.gateway import GatewayProcess, run_gateway
from tests.process.sandbox import ADMIN_TOKEN
from tests.support.images import make_png
from tests.support.network import reserve_port
from tests.support.tasks import make_retention
from tests.support.valkey import run_valkey

KEYS = Keys("bench")
_CONCURRENCY = 16
_HOUR_MS = 3_600_000


@dataclass(frozen=True)
class BenchGateway:
    """The process under test, its store and the other servers."""

    gateway: GatewayProcess
    server: Server
    upstream: str
    store: Any
    tasks: RedisTaskStore
    http: AsyncClient

    async def submit(self, number: int) -> list[Task]:
        """Submit so many images, and keep their tasks watched, so that they are checked at the full rate."""
        headers = {"Authorization": f"Bearer {self.gateway.token}"}
        gate = asyncio.Semaphore(_CONCURRENCY)

        async def one() -> None:
            async with gate:
                files = {"image": ("a.png", make_png(), "image/png")}
                url = f"{self.gateway.url}/v1/tasks/face-enhance"
                (await self.http.post(url, headers=headers, files=files)).raise_for_status()

        async with asyncio.TaskGroup() as group:
            for _ in range(number):
                group.create_task(one())
        results = []
        async for key in self.store.scan_iter(KEYS.task("*"), count=1_000):
            reservation = key.decode().removeprefix(KEYS.task(""))
            await self.store.set(KEYS.poll_watched(reservation), "", px=_HOUR_MS)
            task = await self.tasks.get(reservation)
            assert task
            results.append(task[0])
        return results

    async def wait_for_waiters(self, number: int) -> None:
        """Wait until so many clients wait."""
        until = time.monotonic() + 60
        while f"\ngateway_waiting_clients {number}.0" not in (await self.http.get(self.metrics_url)).text:
            assert time.monotonic() < until, "the clients did not come to wait"
            await asyncio.sleep(0.1)

    @property
    def metrics_url(self) -> str:
        return f"{self.gateway.ops_url}/metrics"


@asynccontextmanager
async def run_bench_gateway(
    *, role: str, latency: float, state: str = "Running", **settings: str
) -> AsyncIterator[BenchGateway]:
    """Run a gateway with an upstream of this latency that reports this state of each task."""
    async with AsyncExitStack() as stack:
        store = stack.enter_context(run_valkey())
        address = stack.enter_context(run_upstream(latency, state))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base_settings = {
            "GATEWAY_REDIS_URL": store.url,
            "GATEWAY_KEY_PREFIX": "bench",
            "GATEWAY_UPSTREAM_URL": address,
            "GATEWAY_UPSTREAM_USER_KEY": "key",
            "GATEWAY_ROLE": role,
            "GATEWAY_LOG_LEVEL": "warning",  # does not log ports
            "GATEWAY_PORT": str(reserve_port()),
            "GATEWAY_OPS_PORT": str(reserve_port()),
        }
        gateway = stack.enter_context(run_gateway(folder, **base_settings, **settings))
        connections = connect(store.url, timeout=60)
        stack.push_async_callback(connections.aclose)
        tasks = RedisTaskStore(RedisScripts(connections.commands), KEYS, make_retention())
        http = await stack.enter_async_context(AsyncClient(timeout=60, trust_env=False))
        server = Server("gateway", gateway.url, (gateway.process.pid,), gateway.token)
        yield BenchGateway(gateway, server, address, connections.commands, tasks, http)


WAITERS = 5_000
TASKS = 500
ENDS_PER_SECOND = 25
"""With ten clients a task, 250 clients are answered each second."""
_CONNECT_CONCURRENCY = 200


async def waiting() -> Sequence[Figure]:
    """5,000 clients, each on its own connection, wait for 500 tasks whose ends another process records."""
    async with run_bench_gateway(role="api", latency=0) as work:
        tasks = await work.submit(TASKS)
        before = work.server.resident_mib()
        gate, ended = asyncio.Semaphore(_CONNECT_CONCURRENCY), dict[str, float]()
        clients = [asyncio.create_task(_wait_for_task(work, tasks[n % TASKS], gate)) for n in range(WAITERS)]
        await work.wait_for_waiters(WAITERS)
        during = work.server.resident_mib()
        for task in tasks:
            started_at = time.monotonic()
            check = CheckResult(outcome=CheckOutcome.SUCCEEDED)
            assert await work.tasks.record_check(ClaimedCheck(task, task.created_at, task.created_at), check)
            ended[task.id] = time.monotonic()
            await asyncio.sleep(1 / ENDS_PER_SECOND - (ended[task.id] - started_at))
        answers = await asyncio.gather(*clients)
        after = work.server.resident_mib()
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


POLLED_TASKS = 2_000
POLL_SECONDS = 2.5
LATENCY_SECONDS = 0.05
SETTLING_SECONDS = 10.0
MEASURED_SECONDS = 20.0


async def polling() -> Sequence[Figure]:
    """2,000 watched tasks, polled by one process every 2.5 s at an upstream with 50 ms latency."""
    async with run_bench_gateway(role="all", latency=LATENCY_SECONDS) as work:
        await work.submit(POLLED_TASKS)
        await asyncio.sleep(SETTLING_SECONDS)
        url = f"{work.upstream}/lateness/{POLL_SECONDS * 1000}"
        await work.http.get(url)
        started_at, used = time.monotonic(), work.server.cpu_seconds()
        await asyncio.sleep(MEASURED_SECONDS)
        share = (work.server.cpu_seconds() - used) / (time.monotonic() - started_at)
        late: list[float] = (await work.http.get(url)).json()
    cuts = quantiles(late, n=100)
    return [
        Figure("checks per second", len(late) / MEASURED_SECONDS, "/s"),
        Figure("share of a core", share * 100, "%", target=50),
        Figure("a check, of a core", share / (len(late) / MEASURED_SECONDS) * 1e6, "us"),
        Figure("lateness of a check: median", cuts[49], "ms"),
        Figure("lateness of a check: 99 of 100", cuts[98], "ms", target=1_000),
    ]


TENANTS = 200
SCRAPES = 40
READS = 3_000
REQUESTS = 20_000
ROUNDS = 5
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
    gate = asyncio.Semaphore(8)

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
