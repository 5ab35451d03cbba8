"""The workloads of the comparison: closed loops, many simultaneous requests, thousands of tasks, and idling."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event

import httpx2
import msgspec
import uvloop
from redis import Redis

from service.domain.ledger import spent_starts
from service.domain.tasks import Kind
from service.storage.redis import Keys
from tests.bench.comparison import ALL, API, REFERENCES, Comparison, Environment
from tests.bench.load import (
    LARGE,
    SMALL,
    Request,
    closed_loop,
    percentile,
    random_png,
    send_all,
    upscale_request,
)
from tests.bench.overload import overload
from tests.bench.peers.servers import SUBMIT_PATH, Server
from tests.bench.stored_tasks import beside_running, list_tasks, poller, read_many, store_work
from tests.support.images import make_png

DIRECT = "vendor, direct"
READ, SMALL_SUBMIT, LARGE_SUBMIT = "read", "submit 300 KB", "submit 10 MB"
LARGE_ROWS = {32: "32 x 10 MB", 256: "256 x 10 MB"}
SLOW_READ, SLOW_SUBMIT = "read, slow vendor", "submit, slow vendor"
SCRAPE, SCRAPED_READ, IDLE = "scrape", "read, scraped", "start and idle"
_SAMPLE_DELAY_SECONDS = 30
_FIRST_CHECK = {"GATEWAY_POLL_SECONDS": "0.5"}
"""Soon, so that checks keep up with the submissions of a short loop."""
_TENANTS = 1_000
_SCRAPES = 20
_SCRAPE_EVERY_SECONDS = 0.5


def read(comparison: Comparison) -> None:
    """One task is read again and again. In role `all` it has ended."""
    _load(comparison, READ, (1, 16), lambda server: server.read_request(server.submit(make_png())))


def submit_small(comparison: Comparison) -> None:
    """Images of 300 KB are submitted. In role `all` the first check, 0.5 s later, ends their tasks."""
    _submit(comparison, SMALL_SUBMIT, (1, 16, 64), random_png(SMALL))


def submit_large(comparison: Comparison) -> None:
    """Images of 10 MB are submitted. In role `all` the first check, 0.5 s later, ends their tasks."""
    _submit(comparison, LARGE_SUBMIT, (1, 16), random_png(LARGE))


def _submit(comparison: Comparison, row: str, numbers: Sequence[int], image: bytes) -> None:
    for _ in range(comparison.rounds):
        with comparison.environment() as env:
            load = closed_loop(env.stub.url, upscale_request(SUBMIT_PATH, image), connections=1)
        figures = {"per_second": load.per_second, "p50_ms": load.p50_ms, "p99_ms": load.p99_ms}
        comparison.add(row, DIRECT, figures, load.errors, connections=1)
    _load(comparison, row, numbers, lambda server: server.submit_request(image))


def _load(comparison: Comparison, row: str, numbers: Sequence[int], prepare: Callable[[Server], Request]) -> None:
    """Load each server with more and more connections; it is restarted for each round."""
    numbers = numbers[:2] if comparison.quick else numbers
    candidates = comparison.candidates(*((API,) if comparison.quick else (API, ALL)), beside=REFERENCES)
    for candidate in candidates * comparison.rounds:
        with comparison.run(candidate, _FIRST_CHECK, tasks="finished") as server:
            request = prepare(server)
            closed_loop(server.url, request)  # warms it up
            for connections in numbers:
                seconds = max(comparison.seconds - 1, 1) if connections == 1 else comparison.seconds  # it varies least
                comparison.measure(row, candidate, server, request, connections=connections, seconds=seconds)


def slow_vendor(comparison: Comparison) -> None:
    """Images of 300 KB are submitted to a vendor that takes 2 s for an answer; a task is read before and beside it."""
    for candidate in comparison.candidates(API):
        with comparison.run(candidate, delay_seconds=2) as server, ThreadPoolExecutor() as threads:
            request, seconds = server.submit_request(random_png(SMALL)), comparison.seconds * 3
            read = server.read_request(server.submit(make_png()))
            alone = closed_loop(server.url, read, seconds=seconds)
            submitting = threads.submit(closed_loop, server.url, request, connections=64, seconds=seconds + 2)
            time.sleep(1)  # until all of them wait for the vendor
            comparison.measure(SLOW_READ, candidate, server, read, seconds=seconds, alone_per_second=alone.per_second)
            load = submitting.result()
            figures = {"per_second": load.per_second, "p50_ms": load.p50_ms, "p99_ms": load.p99_ms}
            comparison.add(SLOW_SUBMIT, candidate.name, figures, load.errors, connections=64)


def large_at_once(comparison: Comparison) -> None:
    """32 and 256 images of 10 MB are submitted at the same moment."""
    for number, row in LARGE_ROWS.items():
        with ExitStack() as stack, ThreadPoolExecutor() as threads:
            measured = []
            for candidate in comparison.candidates(API):
                server = stack.enter_context(comparison.run(candidate))
                figures, errors = _submit_at_once(server, number)
                # Others are measured meanwhile.
                measured.append((candidate, figures, errors, threads.submit(_read_memory_later, server)))
            for candidate, figures, errors, later in measured:
                later_mb = later.result()
                later_figures = {"later_mb": later_mb, "later_share": later_mb / figures["idle_mb"]}
                comparison.add(row, candidate.name, figures | later_figures, errors)


def _read_memory_later(server: Server) -> float:
    time.sleep(_SAMPLE_DELAY_SECONDS)
    return server.resident_mb()


def _submit_at_once(server: Server, number: int) -> tuple[dict[str, float], Counter[str]]:
    idle = server.resident_mb()
    server.reset_peak()
    started_at = time.monotonic()
    answers = uvloop.run(send_all(server.url, server.submit_request(random_png(LARGE)), number, connections=number))
    per_second = len(answers.succeeded()) / (time.monotonic() - started_at)
    return {"per_second": per_second, "idle_mb": idle, "peak_mb": server.peak_mb()}, answers.errors()


def scrape(comparison: Comparison) -> None:
    """The metrics of 1,000 tenants that spent for all kinds, 200 of them named; twice a second while a task is read."""
    limits = [{"window": "day", "tasks": 1_000, "money": 100}, {"window": "month", "tasks": 10_000}]
    tenant = {"accounts": ["main"], "limits": limits, "max_active": 100}
    for candidate in comparison.candidates(API):
        with (
            comparison.environment() as env,
            candidate.start(env) as server,
            env.open_admin(server.ops_url) as http,
            ThreadPoolExecutor() as threads,
        ):
            tenants = [_time_call(http, "PUT", f"/tenants/tenant-{number:04}", tenant) for number in range(_TENANTS)]
            _spend(env, http)
            used = server.cpu_seconds()
            times = [_time_call(http, "GET", f"{server.ops_url}/metrics") for _ in range(_SCRAPES)]
            used = server.cpu_seconds() - used
            figures = {
                "p50_ms": percentile(times, 50) * 1000,
                "p99_ms": percentile(times, 99) * 1000,
                "cpu_ms": used * 1000 / _SCRAPES,
                "put_tenant_p50_ms": percentile(tenants, 50) * 1000,
                "peak_mb": server.peak_mb(),
            }
            comparison.add(SCRAPE, candidate.name, figures, Counter())
            request, done = server.read_request(server.submit(make_png())), Event()
            closed_loop(server.url, request)
            scraping = threads.submit(_scrape_until, done, http, f"{server.ops_url}/metrics")
            try:
                comparison.measure(SCRAPED_READ, candidate, server, request, seconds=comparison.seconds * 2)
            finally:
                done.set()
            scraping.result()


def _spend(env: Environment, http: httpx2.Client) -> None:
    """Charge tasks of every kind to all tenants, as the scripts do it."""
    entries = http.get("/registry").raise_for_status().json()["tenants"].values()
    sums = [number for start in spent_starts(int(time.time() * 1000)) for number in (start, 12, 3_450)]
    fields = {f"spent {kind}": msgspec.msgpack.encode(sums) for kind in Kind}
    with Redis.from_url(env.redis_url) as client, client.pipeline(transaction=False) as pipeline:
        for entry in entries:
            pipeline.hset(Keys("gw").tenant(entry["id"]), mapping=fields)
        pipeline.execute()


def _scrape_until(done: Event, http: httpx2.Client, url: str) -> None:
    while not done.wait(_SCRAPE_EVERY_SECONDS):
        _time_call(http, "GET", url)


def _time_call(http: httpx2.Client, method: str, url: str, body: object = None) -> float:
    """Send a request as the operator; returns its duration."""
    started_at = time.perf_counter()
    http.request(method, url, json=body).raise_for_status()
    return time.perf_counter() - started_at


def start_and_idle(comparison: Comparison) -> None:
    """Servers start one after the other and then do nothing."""
    candidates = comparison.candidates(API, ALL)
    for _ in range(comparison.rounds):
        with ExitStack() as stack:
            servers = [stack.enter_context(comparison.run(candidate)) for candidate in candidates]
            time.sleep(2)  # until they have settled
            before = [(time.monotonic(), server.cpu_seconds()) for server in servers]
            time.sleep(5)
            for candidate, server, (started_at, used) in zip(candidates, servers, before, strict=True):
                share = (server.cpu_seconds() - used) / (time.monotonic() - started_at)
                start, idle = server.start_seconds * 1000, server.resident_mb()
                figures = {"start_ms": start, "cpu_percent": share * 100, "idle_mb": idle}
                comparison.add(IDLE, candidate.name, figures, Counter())


WORKLOADS: Mapping[str, Callable[[Comparison], None]] = {
    "read": read,
    "submit-small": submit_small,
    "submit-large": submit_large,
    "slow-vendor": slow_vendor,
    "large-at-once": large_at_once,
    "overload": overload,
    "poller": poller,
    "read-many": read_many,
    "list": list_tasks,
    "beside-running": beside_running,
    "scrape": scrape,
    "idle": start_and_idle,
    "store": store_work,
}
QUICK = ("read", "submit-small", "submit-large")
