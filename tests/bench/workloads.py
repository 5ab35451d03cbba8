"""The workloads of the comparison: closed loops, many simultaneous requests, thousands of tasks, and idling."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from threading import Event

import httpx2
import uvloop
from redis import Redis

from tests.bench.comparison import (
    ALL,
    API,
    LUA,
    REFERENCES,
    Candidate,
    Comparison,
    Environment,
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
    send_request,
    upscale_request,
)
from tests.bench.peers.servers import SUBMIT_PATH, Server
from tests.support.images import make_png

CONNECTIONS = (1, 16, 64)
DIRECT = "vendor, direct"
READ, SMALL_SUBMIT, LARGE_SUBMIT = "read", "submit 300 KB", "submit 10 MB"
LARGE_ROWS = {32: "32 x 10 MB", 256: "256 x 10 MB"}
_WAITING = ("Prefer", "wait=60")
_SAMPLE_DELAY_SECONDS = 30
_OVERLOAD_FACTOR = 3
_MAX_PER_SECOND = 6_000
_OVERLOAD_SECONDS = 30
_QUICK_SECONDS = 1.0
"""A submission that takes less shows that the overload is over."""
_TIMEOUT_SECONDS = 30
"""The timeout of a client in the overload."""
_MANY = 10_000
_POLL_MS = 2_500
_LONGEST_READING_SECONDS = 13
_SETTLING_SECONDS = 5
_MEASURED_SECONDS = 12
"""Together with the two above, the 30 s for which a task is checked at the full rate after a read."""
_ID = re.compile(rb'"(?:id|task_id)"\s*:\s*"([^"]+)"')
_TENANTS = 1_000
_SCRAPES = 20
_SCRAPE_EVERY_SECONDS = 0.5


def read(comparison: Comparison) -> None:
    """One running task is read again and again."""
    _load(comparison, READ, lambda server: server.read_request(server.submit(make_png())), comparison.seconds)


def submit_small(comparison: Comparison) -> None:
    """Images of 300 KB are submitted."""
    _submit(comparison, SMALL_SUBMIT, random_png(SMALL), comparison.seconds)


def submit_large(comparison: Comparison) -> None:
    """Images of 10 MB are submitted."""
    _submit(comparison, LARGE_SUBMIT, random_png(LARGE), comparison.seconds + (0 if comparison.quick else 1))


def _submit(comparison: Comparison, row: str, image: bytes, seconds: int) -> None:
    for _ in range(comparison.rounds):
        with comparison.environment() as env:
            load = closed_loop(env.stub.url, upscale_request(SUBMIT_PATH, image), connections=1)
        figures = {"per_second": load.per_second, "p50_ms": load.p50_ms, "p99_ms": load.p99_ms}
        comparison.add(row, DIRECT, figures, load.errors, connections=1)
    _load(comparison, row, lambda server: server.submit_request(image), seconds)


def _load(comparison: Comparison, row: str, prepare: Callable[[Server], Request], seconds: int) -> None:
    """Load each server with more and more connections; it is restarted for each round."""
    numbers = CONNECTIONS[:2] if comparison.quick else CONNECTIONS
    candidates = comparison.candidates(*((API,) if comparison.quick else (API, ALL)), beside=REFERENCES)
    for candidate in candidates * comparison.rounds:
        with comparison.run(candidate) as server:
            request = prepare(server)
            closed_loop(server.url, request)  # warms it up
            for connections in numbers:
                shorter = max(seconds - 1, 1) if connections == 1 else seconds  # it varies least
                comparison.measure(row, candidate, server, request, connections=connections, seconds=shorter)


def slow_vendor(comparison: Comparison) -> None:
    """Images of 300 KB are submitted to a vendor that takes 2 s for an answer; a task is read before and beside it."""
    for candidate in comparison.candidates(API):
        with comparison.run(candidate, delay_seconds=2) as server, ThreadPoolExecutor() as threads:
            request, seconds = server.submit_request(random_png(SMALL)), max(comparison.seconds * 3, 5)
            read = server.read_request(server.submit(make_png()))
            comparison.measure("read before", candidate, server, read, seconds=seconds)
            reading = threads.submit(closed_loop, server.url, read, seconds=seconds)
            comparison.measure("slow vendor", candidate, server, request, connections=64, seconds=seconds)
            beside = reading.result()
            figures = {"per_second": beside.per_second, "p50_ms": beside.p50_ms, "p99_ms": beside.p99_ms}
            comparison.add("read beside", candidate.name, figures, beside.errors, connections=16)


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
                comparison.add(row, candidate.name, figures | {"later_mib": later.result()}, errors)


def _read_memory_later(server: Server) -> float:
    time.sleep(_SAMPLE_DELAY_SECONDS)
    return server.resident_mib()


def _submit_at_once(server: Server, number: int) -> tuple[dict[str, float], Counter[str]]:
    idle = server.resident_mib()
    server.reset_peak()
    started_at = time.monotonic()
    answers = uvloop.run(send_all(server.url, server.submit_request(random_png(LARGE)), number, connections=number))
    per_second = len(answers.succeeded()) / (time.monotonic() - started_at)
    return {"per_second": per_second, "idle_mib": idle, "peak_mib": server.peak_mib()}, answers.errors()


def _count_failures(answers: Answers) -> Counter[str]:
    """Return the errors, and the responses without the end of a task that the clients waited for."""
    ended = sum(b'"succeeded"' in body for body in answers.bodies)
    return +(answers.errors() + Counter({"no end": len(answers.succeeded()) - ended}))


def overload(comparison: Comparison) -> None:
    """Images of 300 KB, and then of 10 MB, come three times as fast as the gateway can take them."""
    for row, size in (("overload, 300 KB", SMALL), ("overload, 10 MB", LARGE)):
        for candidate in comparison.candidates(API):
            with comparison.run(candidate) as server:
                comparison.add(row, candidate.name, *_measure_overload(comparison, server, random_png(size)))


def _measure_overload(comparison: Comparison, server: Server, image: bytes) -> tuple[dict[str, float], Counter[str]]:
    request, seconds = server.submit_request(image), 8 if comparison.quick else _OVERLOAD_SECONDS
    read = server.read_request(server.submit(make_png()))
    capacity = closed_loop(server.url, request, seconds=3).per_second
    server.reset_peak()
    used = server.cpu_seconds()
    rate = min(_OVERLOAD_FACTOR * capacity, _MAX_PER_SECOND)
    probes = {
        "health": (server.url, Request("GET", ("/healthz",)), 0.1),
        "read": (server.url, read, 0.1),
        "ops_health": (server.ops_url, Request("GET", ("/healthz",)), 0.1),
        "metrics": (server.ops_url, Request("GET", ("/metrics",)), 5),
    }
    # In a process of its own: that of the load is busy.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        probing = pool.submit(_probe_all, probes, seconds)
        answers, recovery = uvloop.run(_send_overload(server, request, rate, seconds))
        latencies = probing.result()
    times, counts = answers.succeeded(), answers.counts()
    figures = {
        "capacity_per_second": capacity,
        "offered_per_second": counts.total() / answers.sending_seconds,
        "per_second": len(times) / (answers.sending_seconds + recovery),
        "p50_ms": percentile(times, 50) * 1000,
        "max_ms": max(times, default=math.nan) * 1000,
        "recovery_ms": recovery * 1000,
        "cpu_percent": (server.cpu_seconds() - used) / (answers.sending_seconds + recovery) * 100,
        "peak_mib": server.peak_mib(),
    }
    for name, values in latencies.items():
        figures |= {f"{name}_p99_ms": percentile(values, 99) * 1000, f"{name}_max_ms": max(values) * 1000}
    # Rejections are expected here.
    figures |= {f"answers {status}": float(count) for status, count in sorted(counts.items()) if status.isdigit()}
    return figures, Counter({status: count for status, count in counts.items() if not status.isdigit()})


def _probe_all(probes: Mapping[str, tuple[str, Request, float]], seconds: float) -> Mapping[str, list[float]]:
    """Send each request at its interval; return the latencies in seconds."""

    async def run() -> Mapping[str, list[float]]:
        found = {name: Answers() for name in probes}
        done = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for name, (url, request, interval) in probes.items():
                group.create_task(probe(url, request, found[name], done, interval=interval, timeout=_TIMEOUT_SECONDS))
            await asyncio.sleep(seconds)
            done.set()
        return {name: [item for times in answers.seconds.values() for item in times] for name, answers in found.items()}

    return uvloop.run(run())


async def _send_overload(server: Server, request: Request, rate: float, seconds: float) -> tuple[Answers, float]:
    """Offer more than the server can take; return the responses, and the seconds from then to a quick acceptance."""
    async with asyncio.TaskGroup() as group:
        sending = group.create_task(
            open_loop(server.url, request, rate=rate, seconds=seconds, timeout=_TIMEOUT_SECONDS)
        )
        await asyncio.sleep(seconds)
        ended_at = time.perf_counter()
        after = Answers()
        while not any(taken < _QUICK_SECONDS for taken in after.succeeded()):
            await send_request(server.url, request, 0, after, timeout=_TIMEOUT_SECONDS)
        recovery = time.perf_counter() - ended_at
    return sending.result(), recovery


def poller(comparison: Comparison) -> None:
    """2,000 and 10,000 running tasks that callers read are checked every 2.5 s, or as often as the gateway can."""
    for number in (2_000, _MANY):  # the larger store is made of the smaller one
        for candidate in comparison.candidates(ALL):
            env, task_ids = _seed(comparison, candidate, number)
            with candidate.start_reader(env) as reader, candidate.start(env) as server:
                errors = _read_all_once(reader, task_ids)
                comparison.add(f"poller, {number:,}", candidate.name, _measure_poller(server, env.stub), errors)


def _measure_poller(server: Server, stub: Server) -> dict[str, float]:
    time.sleep(_SETTLING_SECONDS)
    before = httpx2.get(f"{stub.url}/stats?reset", trust_env=False).json()
    started_at, used = time.monotonic(), server.cpu_seconds()
    time.sleep(_MEASURED_SECONDS)
    after = httpx2.get(f"{stub.url}/stats", trust_env=False).json()
    seconds, used = time.monotonic() - started_at, server.cpu_seconds() - used
    checks, between = after["checks"] - before["checks"], after["check_interval_ms"]
    return {
        "per_second": checks / seconds,
        "late_p50_ms": max(between["p50"] - _POLL_MS, 0),
        "late_p99_ms": max(between["p99"] - _POLL_MS, 0),
        "cpu_ms": used * 1000 / max(checks, 1),
        "cpu_percent": used / seconds * 100,
    }


def _read_all_once(reader: Server, task_ids: list[str]) -> Counter[str]:
    """Read each task once, so that all are watched; returns the number of errors."""
    request, number = reader.read_request(*task_ids), len(task_ids)
    sample = closed_loop(reader.url, request)
    seconds = min(math.ceil(number / max(sample.per_second, 1) * 1.2), _LONGEST_READING_SECONDS)
    load = closed_loop(reader.url, request, seconds=seconds)
    return +(load.errors + Counter({"tasks not read": max(number - load.succeeded, 0)}))


def _seed(comparison: Comparison, candidate: Candidate, number: int = _MANY) -> tuple[Environment, list[str]]:
    """Return a store with so many running tasks, created through the API of this kind of server, and their ids."""
    key = f"gateway {candidate.label}" if candidate.checkout else candidate.kind
    if key not in comparison.seeded:
        comparison.seeded[key] = comparison.stack.enter_context(comparison.environment(tasks="running")), []
    env, task_ids = comparison.seeded[key]
    if missing := max(number - len(task_ids), 0):
        with candidate.start_reader(env) if candidate.checkout else candidate.start(env) as server:
            request = server.submit_request(make_png())
            answers = uvloop.run(send_all(server.url, request, missing, connections=16))
        if answers.errors():
            raise RuntimeError(f"{candidate.name} did not take all tasks: {answers.counts()}")
        task_ids += [_ID.findall(body)[0].decode() for body in answers.bodies]
    return env, task_ids


def read_many(comparison: Comparison) -> None:
    """10,000 running tasks are read in turn."""
    candidates = comparison.candidates(API, beside=(LUA,))
    for candidate in candidates:
        _seed(comparison, candidate)
    for candidate in candidates * comparison.rounds:
        env, task_ids = _seed(comparison, candidate)
        with candidate.start(env) as server:
            request = server.read_request(*task_ids)
            closed_loop(server.url, request)
            comparison.measure("read 10,000 ids", candidate, server, request, seconds=comparison.seconds)


def list_tasks(comparison: Comparison) -> None:
    """The newest 20 of 10,000 tasks are listed."""
    for candidate in comparison.candidates(API) * comparison.rounds:
        env, _ = _seed(comparison, candidate)
        with candidate.start(env) as server:
            request = Request("GET", ("/v1/tasks?limit=20",), (server.authorization,))
            closed_loop(server.url, request)
            comparison.measure("list", candidate, server, request, seconds=comparison.seconds)


def beside_running(comparison: Comparison) -> None:
    """A task is read, and images of 300 KB are submitted, while 10,000 tasks are checked."""
    for candidate in comparison.candidates(ALL) * comparison.rounds:
        env, task_ids = _seed(comparison, candidate)
        with candidate.start_reader(env) as reader, candidate.start(env) as server:
            _read_all_once(reader, task_ids)
            for row, request in (
                ("read, 10,000 run", server.read_request(task_ids[0])),
                ("300 KB, 10,000 run", server.submit_request(random_png(SMALL))),
            ):
                comparison.measure(row, candidate, server, request, seconds=comparison.seconds)


def scrape(comparison: Comparison) -> None:
    """The metrics of 1,000 tenants with limits are scraped, and a task is read while that happens twice a second."""
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
            used = server.cpu_seconds()
            times = [_time_call(http, "GET", f"{server.ops_url}/metrics") for _ in range(_SCRAPES)]
            used = server.cpu_seconds() - used
            figures = {
                "p50_ms": percentile(times, 50) * 1000,
                "p99_ms": percentile(times, 99) * 1000,
                "cpu_ms": used * 1000 / _SCRAPES,
                "put_tenant_p50_ms": percentile(tenants, 50) * 1000,
                "peak_mib": server.peak_mib(),
            }
            comparison.add("scrape", candidate.name, figures, Counter())
            request, done = server.read_request(server.submit(make_png())), Event()
            closed_loop(server.url, request)
            scraping = threads.submit(_scrape_until, done, http, f"{server.ops_url}/metrics")
            try:
                comparison.measure("read, scraped", candidate, server, request, seconds=comparison.seconds * 2)
            finally:
                done.set()
            scraping.result()


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
    candidates = comparison.candidates(API, ALL, beside=REFERENCES)
    with ExitStack() as stack:
        servers = [stack.enter_context(comparison.run(candidate)) for candidate in candidates]
        time.sleep(3)  # until they have settled
        before = [(time.monotonic(), server.cpu_seconds()) for server in servers]
        time.sleep(10)
        for candidate, server, (started_at, used) in zip(candidates, servers, before, strict=True):
            share = (server.cpu_seconds() - used) / (time.monotonic() - started_at)
            start, idle = server.start_seconds * 1000, server.resident_mib()
            figures = {"start_ms": start, "cpu_percent": share * 100, "idle_mib": idle}
            comparison.add("start and idle", candidate.name, figures, Counter())


def store_memory(comparison: Comparison) -> None:
    """Memory that the store needs for each finished task."""
    for candidate in comparison.candidates(ALL):
        with comparison.environment(tasks="finished") as env:
            env.settings["GATEWAY_POLL_SECONDS"] = "0.5"
            with candidate.start(env) as server, Redis.from_url(env.redis_url) as store:
                _finish_tasks(server)  # not counted: one-time allocations
                before = store.info("memory")["used_memory"]
                answers = _finish_tasks(server)
                used = store.info("memory")["used_memory"] - before
            figures = {"task_bytes": used / max(len(answers.succeeded()), 1)}
            comparison.add("finished tasks", candidate.name, figures, _count_failures(answers))


def _finish_tasks(server: Server) -> Answers:
    """Submit tasks and wait for their ends."""
    request = server.submit_request(make_png(), _WAITING)
    return uvloop.run(send_all(server.url, request, 1_000, connections=32))


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
    "memory": store_memory,
}
QUICK = ("read", "submit-small", "submit-large")
