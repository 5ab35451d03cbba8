"""The workloads of a store with thousands of tasks."""

from __future__ import annotations

import math
import re
import time
from collections import Counter

import httpx2
import uvloop
from redis import Redis

from tests.bench.comparison import (
    ALL,
    API,
    LUA,
    Candidate,
    Comparison,
    Environment,
)
from tests.bench.load import (
    SMALL,
    Answers,
    Request,
    closed_loop,
    random_png,
    send_all,
)
from tests.bench.peers.servers import Server
from tests.support.images import make_png

_WAITING = ("Prefer", "wait=60")
_MANY = 10_000
_POLL_MS = 2_500
_LONGEST_READING_SECONDS = 13
_SETTLING_SECONDS = 5
_MEASURED_SECONDS = 12
"""Together with the two above, the 30 s for which a task is checked at the full rate after a read."""
_ID = re.compile(rb'"(?:id|task_id)"\s*:\s*"([^"]+)"')


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


def _count_failures(answers: Answers) -> Counter[str]:
    """Return the errors, and the responses without the end of a task that the clients waited for."""
    ended = sum(b'"succeeded"' in body for body in answers.bodies)
    return +(answers.errors() + Counter({"no end": len(answers.succeeded()) - ended}))
