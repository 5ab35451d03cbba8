"""The workloads of a store with thousands of tasks."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median

import httpx2
import uvloop
from redis import Redis

from tests.bench.comparison import ALL, API, LUA, Candidate, Comparison, Environment
from tests.bench.load import SMALL, Answers, Request, closed_loop, random_png, send_all
from tests.bench.peers.servers import Server
from tests.support.images import make_png

POLLER, READ_MANY, LIST, FILTER, STORE = (
    "poller, 2,000",
    "read 10,000 ids",
    "list of 20",
    "filter without match",
    "store",
)
READ_BESIDE, SUBMIT_BESIDE, CHECKS_BESIDE = "read, 10,000 run", "submit, 10,000 run", "checks of 10,000"
_WAITING = ("Prefer", "wait=60")
_MANY = 10_000
_LISTED = 100_000
_LOGGED = 100_000
_LONGEST_READING_SECONDS = 13
_SETTLING_SECONDS = 3
_MEASURED_SECONDS = 10
"""Together with the two above, the 30 s for which a task is checked at the full rate after a read."""
_ID = re.compile(rb'"(?:id|task_id)"\s*:\s*"([^"]+)"')
_COPY_TASK = """
local first, count, key = ARGV[1], tonumber(ARGV[2]), KEYS[1]
local prefix = key:sub(1, -#first - 1)
for number = 1, count do
  local copy = first .. number
  redis.call('COPY', key, prefix .. copy)
  for position = 2, #KEYS do
    redis.call('ZADD', KEYS[position], redis.call('ZSCORE', KEYS[position], first) - number, copy)
  end
end
"""
"""Stores older copies of a task and adds them to sorted sets that have it."""


def poller(comparison: Comparison) -> None:
    """2,000 running tasks that callers read are checked every 2.5 s."""
    for candidate in comparison.candidates(ALL):
        env, task_ids = _seed(comparison, candidate, 2_000)
        with candidate.start_reader(env) as reader, candidate.start(env) as server:
            errors = _read_all_once(reader, task_ids)
            time.sleep(_SETTLING_SECONDS)
            checks, started_at, used = count_checks(env.stub), time.monotonic(), server.cpu_seconds()
            time.sleep(_MEASURED_SECONDS)
            checks, used = count_checks(env.stub) - checks, server.cpu_seconds() - used
            seconds = time.monotonic() - started_at
        figures = {"interval_ms": len(task_ids) * seconds * 1000 / max(checks, 1)}
        figures |= {"cpu_ms": used * 1000 / max(checks, 1), "cpu_percent": used / seconds * 100}
        comparison.add(POLLER, candidate.name, figures, errors)


def count_checks(stub: Server) -> int:
    return int(httpx2.get(f"{stub.url}/stats", trust_env=False).json()["checks"])


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
            comparison.measure(READ_MANY, candidate, server, request, seconds=comparison.seconds)


def beside_running(comparison: Comparison) -> None:
    """A task is read, and images of 300 KB are submitted, in a process that checks 10,000 tasks, and in role `api`."""
    for candidate in comparison.candidates(ALL):
        _seed(comparison, candidate)
    for candidate in comparison.candidates(ALL) * comparison.rounds:
        with comparison.run(replace(candidate, kind=API)) as server:
            requests = server.read_request(server.submit(make_png())), server.submit_request(random_png(SMALL))
            alone = [closed_loop(server.url, item, seconds=comparison.seconds).per_second for item in requests]
        env, task_ids = _seed(comparison, candidate)
        with comparison.copy(env) as copy, candidate.start_reader(copy) as reader, candidate.start(copy) as server:
            errors = _read_all_once(reader, task_ids)
            checks, started_at = count_checks(copy.stub), time.monotonic()
            requests = server.read_request(task_ids[0]), server.submit_request(random_png(SMALL))
            for row, request, rate in zip((READ_BESIDE, SUBMIT_BESIDE), requests, alone, strict=True):
                seconds = comparison.seconds
                comparison.measure(row, candidate, server, request, seconds=seconds, alone_per_second=rate)
            checks, lasted = count_checks(copy.stub) - checks, time.monotonic() - started_at
            figures = {"interval_ms": len(task_ids) * lasted * 1000 / max(checks, 1)}
            comparison.add(CHECKS_BESIDE, candidate.name, figures, errors)


def list_tasks(comparison: Comparison) -> None:
    """The newest 20 of 100,000 tasks are listed; *store ms* is the CPU time of the gateway's part for the store."""
    for candidate in comparison.candidates(API):
        with comparison.environment() as env:
            env.settings["GATEWAY_KEY_PREFIX"] = "plain"  # that of the program which measures that part
            with candidate.start(env) as server, Redis.from_url(env.redis_url, decode_responses=True) as store:
                server.submit(make_png())
                tenant = _copy_task(store)
                for row, path in ((LIST, "/v1/tasks"), (FILTER, "/v1/tasks?state=failed")):
                    request = Request("GET", (path,), (server.authorization,))
                    closed_loop(server.url, request, connections=1)
                    comparison.measure(row, candidate, server, request, connections=1, seconds=comparison.seconds)
            for row, milliseconds in zip((LIST, FILTER), _measure_lists(candidate, env, tenant), strict=True):
                comparison.add(row, candidate.name, {"store_ms": milliseconds}, Counter())


def _copy_task(store: Redis) -> str:
    """Copy the only task of a store until it has _LISTED; returns its tenant's id."""
    (key,) = map(str, store.keys("{plain}:task:*"))
    reservation = key.rpartition(":")[2]
    indexes = [str(name) for name in store.scan_iter(_type="zset") if store.zscore(name, reservation) is not None]
    store.eval(_COPY_TASK, 1 + len(indexes), key, *indexes, reservation, str(_LISTED - 1))
    (tenant,) = (name.rpartition(":")[2] for name in indexes if name.startswith("{plain}:tasks:"))
    return tenant


def _measure_lists(candidate: Candidate, env: Environment, tenant: str) -> list[float]:
    """Let the gateway's own modules read a list and a filtered one; returns their CPU times in milliseconds."""
    program, folder = Path(__file__).with_name("list_in_store.py"), str(candidate.checkout)
    command = ["env", "-C", folder, f"PYTHONPATH={folder}", f"{folder}/.venv/bin/python", str(program)]
    done = subprocess.run([*command, env.redis_url, tenant], check=True, stdout=subprocess.PIPE)
    times: list[float] = json.loads(done.stdout)
    return times


def store_work(comparison: Comparison) -> None:
    """Tasks are submitted and end: the memory of the store for each, and the time of its scripts (medians)."""
    for candidate in comparison.candidates(ALL):
        with comparison.environment(tasks="finished") as env:
            env.settings["GATEWAY_POLL_SECONDS"] = "0.1"
            with candidate.start(env) as server, Redis.from_url(env.redis_url) as client:
                _finish_tasks(server)  # not counted: one-time allocations
                before = client.info("memory")["used_memory"]
                answers = _finish_tasks(server)
                used = client.info("memory")["used_memory"] - before
                client.config_set("slowlog-max-len", _LOGGED)
                client.config_set("slowlog-log-slower-than", 0)
                _finish_tasks(server)
                times = _read_script_times(client, candidate)
        figures = {"task_bytes": used / max(len(answers.succeeded()), 1)} | times
        comparison.add(STORE, candidate.name, figures, _count_failures(answers))


def _read_script_times(client: Redis, candidate: Candidate) -> dict[str, float]:
    """Return the median of each script in microseconds, from the store's log of all commands."""
    folder = candidate.checkout / "service/storage/lua" if candidate.checkout else Path()
    sources = {file.stem: file.read_bytes() for file in folder.glob("*.lua")}
    times: dict[bytes, list[int]] = {}
    for entry in client.slowlog_get(_LOGGED):
        name, _, arguments = entry["command"].partition(b" ")
        if name == b"EVALSHA":
            times.setdefault(arguments.partition(b" ")[0], []).append(entry["duration"])
    figures = {}
    for sha, durations in times.items():
        shown: bytes = client.execute_command("SCRIPT", "SHOW", sha)  # type: ignore[no-untyped-call]
        (script,) = (name for name, source in sources.items() if shown.endswith(source))
        figures[f"{script}_us"] = float(median(durations))
    return dict(sorted(figures.items()))


def _finish_tasks(server: Server) -> Answers:
    """Submit tasks and wait for their ends."""
    request = server.submit_request(make_png(), _WAITING)
    return uvloop.run(send_all(server.url, request, 1_000, connections=32))


def _count_failures(answers: Answers) -> Counter[str]:
    """Return the errors, and the responses without the end of a task that the clients waited for."""
    ended = sum(b'"succeeded"' in body for body in answers.bodies)
    return +(answers.errors() + Counter({"no end": len(answers.succeeded()) - ended}))
