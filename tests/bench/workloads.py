"""The workloads of the comparison: closed loops, and many simultaneous requests."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import uvloop

from tests.bench import upkeep
from tests.bench.comparison import (
    ALL,
    API,
    API_AND_WORKER,
    FASTAPI,
    LUA,
    PROXY,
    Candidate,
    Comparison,
    Target,
    run_candidate,
    upscale_request,
)
from tests.bench.load import (
    LARGE,
    SMALL,
    Answers,
    Request,
    closed_loop,
    open_loop,
    percentile,
    probe,
    random_png,
    send_all,
)
from tests.bench.peers.servers import SUBMIT_PATH
from tests.support.images import make_png

CONNECTIONS = (1, 16, 64)
QUICK_CONNECTIONS = (1, 16)
DIRECT = "vendor, direct"
READ, SMALL_SUBMIT, LARGE_SUBMIT, SLOW_VENDOR = "read", "submit 300 KB", "submit 10 MB", "slow vendor"
_WARM_UP_SECONDS = 1
_SLOW_SECONDS = 2.0


def read(comparison: Comparison) -> None:
    """One running task is read again and again."""
    _load(comparison, READ, _candidates(comparison), lambda target: target.read_request(target.submit(make_png())))


def submit_small(comparison: Comparison) -> None:
    """Images of 300 KB are submitted."""
    _submit(comparison, SMALL_SUBMIT, random_png(SMALL), comparison.seconds)


def submit_large(comparison: Comparison) -> None:
    """Images of 10 MB are submitted."""
    _submit(comparison, LARGE_SUBMIT, random_png(LARGE), comparison.seconds + (0 if comparison.quick else 1))


def slow_vendor(comparison: Comparison) -> None:
    """Images of 300 KB are submitted to a vendor that takes 2 s for each answer."""
    image = random_png(SMALL)
    for candidate in comparison.gateways(API, ALL) + comparison.references(LUA, FASTAPI):
        with run_candidate(comparison, candidate, delay_seconds=_SLOW_SECONDS) as (_, target):
            seconds = max(comparison.seconds * 3, 5)
            request = target.submit_request(image)
            comparison.measure(SLOW_VENDOR, candidate, target, request, connections=64, seconds=seconds)


def _candidates(comparison: Comparison) -> list[Candidate]:
    if comparison.quick:
        return comparison.gateways(API) + comparison.references(LUA, FASTAPI)
    return comparison.gateways(API, ALL, API_AND_WORKER) + comparison.references(PROXY, LUA, FASTAPI)


def _submit(comparison: Comparison, row: str, image: bytes, seconds: int) -> None:
    for _ in range(comparison.rounds):
        with comparison.environment() as env:
            request = upscale_request(SUBMIT_PATH, image)
            load = closed_loop(env.stub.url, request, connections=1, seconds=_WARM_UP_SECONDS)
        figures = {"per_second": load.per_second, "p50_ms": load.p50_ms, "p99_ms": load.p99_ms}
        comparison.add(row, DIRECT, figures, load.errors, connections=1)
    _load(comparison, row, _candidates(comparison), lambda target: target.submit_request(image), seconds)


def _load(
    comparison: Comparison,
    row: str,
    candidates: Sequence[Candidate],
    prepare: Callable[[Target], Request],
    seconds: int = 0,
) -> None:
    """Load each server with more and more connections; it is restarted for each round."""
    seconds = seconds or comparison.seconds
    for candidate in comparison.alternate(candidates):
        with run_candidate(comparison, candidate) as (_, target):
            request = prepare(target)
            closed_loop(target.url, request, connections=16, seconds=_WARM_UP_SECONDS)
            for connections in QUICK_CONNECTIONS if comparison.quick else CONNECTIONS:
                shorter = max(seconds - 1, 1) if connections == 1 else seconds  # it varies least
                comparison.measure(row, candidate, target, request, connections=connections, seconds=shorter)


LARGE_ROWS = {32: "32 x 10 MB", 64: "64 x 10 MB", 256: "256 x 10 MB"}
WAITERS_ROW = "1,000 waiters"
OVERLOAD_ROWS = {SMALL: "overload, 300 KB", LARGE: "overload, 10 MB"}
_SAMPLE_DELAY_SECONDS = 30
_WAITERS = 1_000
_ARRIVALS_PER_SECOND = 50
_WAIT_SECONDS = 20
"""The time of the first check, which ends a task: by then all clients wait."""
_OVERLOAD_FACTOR = 3
_MAX_PER_SECOND = 6_000
_OVERLOAD_SECONDS = 8
_TIMEOUT_SECONDS = 30
"""The timeout of a client in the overload."""


def large_at_once(comparison: Comparison) -> None:
    """32, 64 and 256 images of 10 MB are submitted at the same moment."""
    for number, row in LARGE_ROWS.items():
        with ExitStack() as stack:
            measured = []
            for candidate in comparison.gateways(API, ALL) + comparison.references(LUA, FASTAPI):
                _, target = stack.enter_context(run_candidate(comparison, candidate))
                figures, errors = _submit_at_once(target, number)
                later = _MemorySampler(target)
                later.start()
                measured.append((candidate, figures, errors, later))
            for candidate, figures, errors, later in measured:
                later.join()
                comparison.add(row, candidate.name, figures | {"later_mib": later.resident_mib}, errors)


class _MemorySampler(threading.Timer):
    """Reads the memory of a server some time later, while others are measured."""

    def __init__(self, target: Target) -> None:
        super().__init__(_SAMPLE_DELAY_SECONDS, self._read)
        self.daemon = True
        self.resident_mib = math.nan
        self._target = target

    def _read(self) -> None:
        self.resident_mib = self._target.server.resident_mib()


def _submit_at_once(target: Target, number: int) -> tuple[dict[str, float], Counter[str]]:
    idle = target.server.resident_mib()
    target.server.reset_peak()
    started_at = time.monotonic()
    request = target.submit_request(random_png(LARGE))
    answers = uvloop.run(send_all(target.url, request, number, connections=number))
    figures = {
        "per_second": len(answers.succeeded()) / (time.monotonic() - started_at),
        "idle_mib": idle,
        "peak_mib": target.server.peak_mib(),
    }
    return figures, answers.errors()


def waiters(comparison: Comparison) -> None:
    """1,000 clients submit a small image with `Prefer: wait`, and get the end that the first check finds 20 s later."""
    for candidate in comparison.gateways(ALL):
        with comparison.environment(tasks="finished") as env:
            env.settings["GATEWAY_POLL_SECONDS"] = str(_WAIT_SECONDS)
            with candidate.start(env) as target:
                comparison.add(WAITERS_ROW, candidate.name, *_measure_waiters(target))


def _measure_waiters(target: Target) -> tuple[dict[str, float], Counter[str]]:
    server = target.server
    idle = server.resident_mib()
    server.reset_peak()
    used = server.cpu_seconds()
    request = target.submit_request(make_png()).with_headers(Prefer="wait=60")
    seconds = _WAITERS / _ARRIVALS_PER_SECOND
    answers = uvloop.run(open_loop(target.url, request, rate=_ARRIVALS_PER_SECOND, seconds=seconds, timeout=90))
    used = server.cpu_seconds() - used
    times = answers.succeeded()
    figures = {
        "late_p50_ms": (percentile(times, 50) - _WAIT_SECONDS) * 1000,
        "late_p99_ms": (percentile(times, 99) - _WAIT_SECONDS) * 1000,
        "cpu_ms": used * 1000 / max(len(times), 1),
        "idle_mib": idle,
        "peak_mib": server.peak_mib(),
    }
    ended = sum(b'"succeeded"' in body for body in answers.bodies)
    return figures, +(answers.errors() + Counter({"no end": len(times) - ended}))


def overload_small(comparison: Comparison) -> None:
    """Images of 300 KB come three times as fast as the gateway can take them."""
    _measure_overload(comparison, SMALL)


def overload_large(comparison: Comparison) -> None:
    """Images of 10 MB come three times as fast as the gateway can take them."""
    _measure_overload(comparison, LARGE)


def _measure_overload(comparison: Comparison, size: int) -> None:
    image = random_png(size)
    for candidate in comparison.gateways(API):
        with run_candidate(comparison, candidate) as (_, target):
            request = target.submit_request(image)
            capacity = closed_loop(target.url, request, connections=16, seconds=3).per_second
            rate = min(_OVERLOAD_FACTOR * capacity, _MAX_PER_SECOND)
            target.server.reset_peak()
            started_at = time.monotonic()
            answers, health = uvloop.run(_send_overload(target, request, rate))
            seconds = time.monotonic() - started_at
            times, counts = answers.succeeded(), answers.counts()
            figures = {
                "capacity_per_second": capacity,
                "offered_per_second": counts.total() / answers.sending_seconds,
                "per_second": len(times) / seconds,
                "p50_ms": percentile(times, 50) * 1000,
                "p99_ms": percentile(times, 99) * 1000,
                "peak_mib": target.server.peak_mib(),
                "health_max_ms": _longest_ms(health[0]),
                "ops_health_max_ms": _longest_ms(health[1]),
            }
            # Rejections are expected here.
            text = {f"answers {status}": float(count) for status, count in sorted(counts.items()) if status.isdigit()}
            errors = Counter({status: count for status, count in counts.items() if not status.isdigit()})
            comparison.add(OVERLOAD_ROWS[size], candidate.name, figures | text, errors)


async def _send_overload(target: Target, request: Request, rate: float) -> tuple[Answers, list[Answers]]:
    """Offer more than the server can take, while both ports are probed."""
    health, done = [Answers(), Answers()], asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for url, answers in zip((target.url, target.ops_url), health, strict=True):
            group.create_task(probe(url, "/healthz", answers, done.is_set, timeout=_TIMEOUT_SECONDS))
        answers = await open_loop(target.url, request, rate=rate, seconds=_OVERLOAD_SECONDS, timeout=_TIMEOUT_SECONDS)
        done.set()
    return answers, health


def _longest_ms(answers: Answers) -> float:
    return max((item for times in answers.seconds.values() for item in times), default=0) * 1000


Workload = Callable[[Comparison], None]

WORKLOADS: Mapping[str, tuple[Workload, tuple[str, ...]]] = {
    "read": (read, (READ,)),
    "submit-small": (submit_small, (SMALL_SUBMIT,)),
    "submit-large": (submit_large, (LARGE_SUBMIT,)),
    "slow-vendor": (slow_vendor, (SLOW_VENDOR,)),
    "large-at-once": (large_at_once, tuple(LARGE_ROWS.values())),
    "waiters": (waiters, (WAITERS_ROW,)),
    "overload-small": (overload_small, (OVERLOAD_ROWS[SMALL],)),
    "overload-large": (overload_large, (OVERLOAD_ROWS[LARGE],)),
    # The larger store is made of the smaller one, so that these keep their order.
    "poller-few": (upkeep.poller_few, (upkeep.POLLER[upkeep.FEW],)),
    "poller-many": (upkeep.poller_many, (upkeep.POLLER[upkeep.MANY],)),
    "read-many": (upkeep.read_many, (upkeep.MANY_IDS,)),
    "list": (upkeep.list_tasks, (upkeep.LIST,)),
    "beside-running": (upkeep.beside_running, (upkeep.READ_BESIDE, upkeep.SUBMIT_BESIDE)),
    "scrape": (upkeep.scrape, (upkeep.SCRAPE, upkeep.READ_SCRAPED)),
    "idle": (upkeep.start_and_idle, (upkeep.IDLE,)),
    "memory": (upkeep.store_memory, (upkeep.STORED,)),
}
"""By name: the function, and the headings of its measurements."""
QUICK = ("read", "submit-small", "submit-large")


def row_titles() -> dict[str, str]:
    """Return the description of each heading."""
    return {heading: (workload.__doc__ or "") for workload, headings in WORKLOADS.values() for heading in headings}
