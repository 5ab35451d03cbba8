"""Workloads beside requests: thousands of tasks, scrapes, start, idling, memory of the store."""

from __future__ import annotations

import math
import re
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field

import httpx2
import uvloop
from redis import Redis

from tests.bench.comparison import (
    ALL,
    API,
    API_AND_WORKER,
    FASTAPI,
    LUA,
    PROXY,
    Candidate,
    Comparison,
    Environment,
    Target,
    run_candidate,
    run_reader_gateway,
)
from tests.bench.load import SMALL, Request, closed_loop, percentile, random_png, send_all
from tests.bench.peers.servers import stub_stats
from tests.support.images import make_png

FEW, MANY = 2_000, 10_000
POLLER = {FEW: "poller, 2,000", MANY: "poller, 10,000"}
MANY_IDS, LIST = "read 10,000 ids", "list"
READ_BESIDE, SUBMIT_BESIDE = "read, 10,000 run", "300 KB, 10,000 run"
_POLL_MS = 2_500
_CONCURRENCY = 16
_WARM_UP_SECONDS = 1
_LONGEST_READING_SECONDS = 13
_SETTLING_SECONDS = 5
_MEASURED_SECONDS = 12
"""Together with the two above, the 30 s for which a task is checked at the full rate after a read."""
_ID = re.compile(rb'"(?:id|task_id)"\s*:\s*"([^"]+)"')


@dataclass
class SeededStore:
    """A store with many running tasks."""

    env: Environment
    task_ids: list[str] = field(default_factory=list)


def poller_few(comparison: Comparison) -> None:
    """2,000 running tasks that callers read are checked every 2.5 s."""
    _measure_poller(comparison, FEW)


def poller_many(comparison: Comparison) -> None:
    """10,000 running tasks that callers read are checked every 2.5 s, or as often as the gateway can."""
    _measure_poller(comparison, MANY)


def read_many(comparison: Comparison) -> None:
    """10,000 running tasks are read in turn."""
    candidates = comparison.gateways(API) + comparison.references(LUA, FASTAPI)
    for candidate in candidates:
        _seed(comparison, candidate, MANY)
    for candidate in comparison.alternate(candidates):
        store = _seed(comparison, candidate, MANY)
        with candidate.start(store.env) as target:
            request = target.read_request(*store.task_ids)
            closed_loop(target.url, request, connections=16, seconds=_WARM_UP_SECONDS)
            comparison.measure(MANY_IDS, candidate, target, request, connections=16, seconds=comparison.seconds)


def list_tasks(comparison: Comparison) -> None:
    """The newest 20 of 10,000 tasks are listed."""
    candidates = comparison.gateways(API)
    for candidate in comparison.alternate(candidates):
        store = _seed(comparison, candidate, MANY)
        with candidate.start(store.env) as target:
            request = Request("GET", ("/v1/tasks?limit=20",), (target.authorization,))
            closed_loop(target.url, request, connections=16, seconds=_WARM_UP_SECONDS)
            comparison.measure(LIST, candidate, target, request, connections=16, seconds=comparison.seconds)


def beside_running(comparison: Comparison) -> None:
    """A task is read, and images of 300 KB are submitted, while 10,000 tasks are checked."""
    for candidate in comparison.alternate(comparison.gateways(ALL, API_AND_WORKER)):
        store = _seed(comparison, candidate, MANY)
        with run_reader_gateway(candidate, store.env) as reader, candidate.start(store.env) as target:
            _read_all_once(reader, store)
            request = target.read_request(store.task_ids[0])
            comparison.measure(READ_BESIDE, candidate, target, request, connections=16, seconds=comparison.seconds)
            request = target.submit_request(random_png(SMALL))
            comparison.measure(SUBMIT_BESIDE, candidate, target, request, connections=16, seconds=comparison.seconds)


def _measure_poller(comparison: Comparison, number: int) -> None:
    for candidate in comparison.gateways(ALL):
        store = _seed(comparison, candidate, number)
        with run_reader_gateway(candidate, store.env) as reader, candidate.start(store.env) as target:
            errors = _read_all_once(reader, store)
            time.sleep(_SETTLING_SECONDS)
            before = stub_stats(store.env.stub, reset=True)
            started_at, used = time.monotonic(), target.server.cpu_seconds()
            time.sleep(_MEASURED_SECONDS)
            after, seconds = stub_stats(store.env.stub), time.monotonic() - started_at
            used = target.server.cpu_seconds() - used
        checks = after["checks"] - before["checks"]
        between = after["check_interval_ms"]
        figures = {
            "per_second": checks / seconds,
            "late_p50_ms": max(between["p50"] - _POLL_MS, 0),
            "late_p99_ms": max(between["p99"] - _POLL_MS, 0),
            "cpu_ms": used * 1000 / max(checks, 1),
            "cpu_percent": used / seconds * 100,
        }
        comparison.add(POLLER[number], candidate.name, figures, errors)


def _read_all_once(reader: Target, store: SeededStore) -> Counter[str]:
    """Read each task once, so that all are watched; returns the number of errors."""
    request, number = reader.read_request(*store.task_ids), len(store.task_ids)
    sample = closed_loop(reader.url, request, connections=_CONCURRENCY, seconds=_WARM_UP_SECONDS)
    seconds = min(math.ceil(number / max(sample.per_second, 1) * 1.2), _LONGEST_READING_SECONDS)
    load = closed_loop(reader.url, request, connections=_CONCURRENCY, seconds=seconds)
    return +(load.errors + Counter({"tasks not read": max(number - load.succeeded, 0)}))


def _seed(comparison: Comparison, candidate: Candidate, number: int) -> SeededStore:
    """Return a store with so many running tasks, created through the API of this kind of server."""
    if candidate.data_format not in comparison.seeded:
        env = comparison.enter(comparison.environment(tasks="running"))
        comparison.seeded[candidate.data_format] = SeededStore(env)
    store: SeededStore = comparison.seeded[candidate.data_format]
    missing = number - len(store.task_ids)
    if missing > 0:
        maker = Candidate(API, candidate.checkout, candidate.label) if candidate.checkout else candidate
        with maker.start(store.env) as target:
            answers = uvloop.run(
                send_all(target.url, target.submit_request(make_png()), missing, connections=_CONCURRENCY)
            )
        if answers.errors():
            raise RuntimeError(f"{maker.name} did not take all tasks: {answers.counts()}")
        store.task_ids += [_ID.findall(body)[0].decode() for body in answers.bodies]
    return store


SCRAPE, READ_SCRAPED = "scrape", "read, scraped"
IDLE, STORED = "start and idle", "finished tasks"
TENANTS = 1_000
_SCRAPES = 20
_SCRAPE_EVERY_SECONDS = 0.5
_START_SETTLING_SECONDS = 3
_IDLE_SECONDS = 10
_STORED_TASKS = 1_000


def scrape(comparison: Comparison) -> None:
    """The metrics of 1,000 tenants with limits are scraped, and a task is read while that happens twice a second."""
    for candidate in comparison.gateways(API):
        with run_candidate(comparison, candidate) as (_, target):
            tenants = _make_tenants(target)
            with httpx2.Client(timeout=30, trust_env=False) as http:
                used = target.server.cpu_seconds()
                times = [_time_scrape(http, target) for _ in range(_SCRAPES)]
                used = target.server.cpu_seconds() - used
            figures = {
                "p50_ms": percentile(times, 50) * 1000,
                "p99_ms": percentile(times, 99) * 1000,
                "cpu_ms": used * 1000 / _SCRAPES,
                "put_tenant_p50_ms": percentile(tenants, 50) * 1000,
                "peak_mib": target.server.peak_mib(),
            }
            comparison.add(SCRAPE, candidate.name, figures, Counter())
            request = target.read_request(target.submit(make_png()))
            closed_loop(target.url, request, connections=16, seconds=1)
            with _Scraper(target):
                comparison.measure(
                    READ_SCRAPED, candidate, target, request, connections=16, seconds=comparison.seconds * 2
                )


def start_and_idle(comparison: Comparison) -> None:
    """Servers start one after the other and then do nothing."""
    candidates = comparison.gateways(API, ALL, API_AND_WORKER) + comparison.references(PROXY, LUA, FASTAPI)
    with ExitStack() as stack:
        targets = [stack.enter_context(run_candidate(comparison, candidate))[1] for candidate in candidates]
        time.sleep(_START_SETTLING_SECONDS)
        before = [(time.monotonic(), target.server.cpu_seconds()) for target in targets]
        time.sleep(_IDLE_SECONDS)
        for candidate, target, (started_at, used) in zip(candidates, targets, before, strict=True):
            share = (target.server.cpu_seconds() - used) / (time.monotonic() - started_at)
            figures = {
                "start_ms": target.start_seconds * 1000,
                "cpu_percent": share * 100,
                "idle_mib": target.server.resident_mib(),
            }
            comparison.add(IDLE, candidate.name, figures, Counter())


def store_memory(comparison: Comparison) -> None:
    """Memory that the store needs for each finished task."""
    for candidate in comparison.gateways(ALL):
        with comparison.environment(tasks="finished") as env:
            env.settings["GATEWAY_POLL_SECONDS"] = "0.5"
            with candidate.start(env) as target, Redis.from_url(env.redis_url) as store:
                _finish_tasks(target)  # not counted: one-time allocations
                before = store.info("memory")["used_memory"]
                ended, errors = _finish_tasks(target)
                used = store.info("memory")["used_memory"] - before
            comparison.add(STORED, candidate.name, {"task_bytes": used / max(ended, 1)}, errors)


def _finish_tasks(target: Target) -> tuple[int, Counter[str]]:
    """Submit tasks and wait for their ends; returns the number of ends, and errors."""
    request = target.submit_request(make_png()).with_headers(Prefer="wait=60")
    answers = uvloop.run(send_all(target.url, request, _STORED_TASKS, connections=_CONCURRENCY * 2))
    ended = sum(b'"succeeded"' in body for body in answers.bodies)
    return ended, +(answers.errors() + Counter({"no end": len(answers.succeeded()) - ended}))


class _Scraper(threading.Thread):
    """Scrapes at a steady pace within a block."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self._target = target
        self._stop_event = threading.Event()
        self.failure: Exception | None = None

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *failure: object) -> None:
        self._stop_event.set()
        self.join()
        if self.failure and not any(failure):
            raise self.failure

    def run(self) -> None:
        try:
            with httpx2.Client(timeout=30, trust_env=False) as http:
                while not self._stop_event.wait(_SCRAPE_EVERY_SECONDS):
                    _time_scrape(http, self._target)
        except httpx2.HTTPError as error:
            self.failure = error


def _time_scrape(http: httpx2.Client, target: Target) -> float:
    started_at = time.perf_counter()
    http.get(f"{target.ops_url}/metrics").raise_for_status()
    return time.perf_counter() - started_at


def _make_tenants(target: Target) -> list[float]:
    """Create tenants with limits; returns the duration of each request."""
    headers, times = {"Authorization": f"Bearer {target.admin_token}"}, []
    limits = [{"window": "day", "tasks": 1_000, "money": 100}, {"window": "month", "tasks": 10_000}]
    body = {"accounts": ["main"], "limits": limits, "max_active": 100}
    with httpx2.Client(base_url=f"{target.ops_url}/admin/v1/tenants", headers=headers, trust_env=False) as http:
        for number in range(TENANTS):
            started_at = time.perf_counter()
            http.put(f"/tenant-{number:04}", json=body).raise_for_status()
            times.append(time.perf_counter() - started_at)
    return times
