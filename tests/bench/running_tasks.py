"""Workloads on a store with thousands of running tasks."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from dataclasses import dataclass, field

import uvloop

from tests.bench.candidates import (
    ALL,
    API,
    API_AND_WORKER,
    FASTAPI,
    LUA,
    Candidate,
    Environment,
    Target,
    run_reader_gateway,
)
from tests.bench.comparison import Comparison
from tests.bench.images import SMALL, random_png
from tests.bench.load import Request, closed_loop, send_all
from tests.bench.peers.stub import stub_stats
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
    store: SeededStore = comparison.seeded.setdefault(candidate.data_format, None) or SeededStore(
        comparison.enter(comparison.environment(tasks="running"))
    )
    comparison.seeded[candidate.data_format] = store
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
