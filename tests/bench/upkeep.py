"""The cost of a gateway beside its requests: scrapes, start, idling."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import ExitStack

import httpx2

from tests.bench.candidates import ALL, API, API_AND_WORKER, FASTAPI, LUA, PROXY, Target
from tests.bench.comparison import Comparison, run_candidate
from tests.bench.load import closed_loop, percentile
from tests.support.images import make_png

SCRAPE, READ_SCRAPED = "scrape", "read, scraped"
IDLE = "start and idle"
TENANTS = 1_000
_SCRAPES = 20
_SCRAPE_EVERY_SECONDS = 0.5
_SETTLING_SECONDS = 3
_IDLE_SECONDS = 10


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
        time.sleep(_SETTLING_SECONDS)
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
