"""A run: a gateway with its store and sandbox, mixed traffic, samples, and the verdicts."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import httpx2
from redis import Redis

from service.devstack import DEMO_NAME, SANDBOX_USER_KEY, with_parent_death_signal
from tests.chaos.receiver import run_receiver
from tests.process.gateway import HTTP, GatewayProcess, run_gateway
from tests.process.sandbox import ADMIN_TOKEN
from tests.soak.sampler import KeyCount, Sample, Sampler
from tests.soak.traffic import Traffic
from tests.soak.verdict import Outcome, Verdict, judge

WARM_UP_SHARE = 0.2
"""Of the time: until then caches fill, and code is loaded at its first use."""
_COMMAND = (sys.executable, "-m", "tests.soak.bounds")
_SAMPLES = 120
_KEY_COUNTS = 24
_TENANTS = 8
_TASK_SECONDS = 0.5
_DRAIN_SECONDS = 60.0
_LIMIT_SECONDS = 600.0
"""The limits are those of a rise in 10 minutes."""
_MAX_UNEXPECTED_SHARE = 0.001
_RUNNING_SETS = ("poll:", "leases", "webhook:")
"""Sorted sets of what is under way; the others index what is stored."""
_DRAINED = {
    "gateway_http_requests_in_progress": 1.0,  # the scrape itself
    "gateway_waiting_clients": 0.0,
    "gateway_upload_bytes": 0.0,
    "gateway_settlements_pending": 0.0,
    "gateway_poll_checks_in_progress": 0.0,
    "gateway_poll_tasks": 0.0,
    "gateway_webhook_queues": 0.0,
    "gateway_tasks_active": 0.0,
}
"""The sum of each gauge once all has ended."""


@dataclass(frozen=True)
class Result:
    """What a run has measured. `faults` are its errors beside the verdicts."""

    seconds: float
    samples: Sequence[Sample]
    key_counts: Sequence[KeyCount]
    requests: int
    verdicts: Sequence[Verdict]
    faults: Sequence[str]

    @property
    def has_passed(self) -> bool:
        return not self.faults and all(verdict.outcome is not Outcome.FAILED for verdict in self.verdicts)


def run_soak(seconds: float, folder: Path, report: Callable[[str], None]) -> Result:
    """Run the traffic for so long; `report` gets a line now and then. The folder keeps the log of the gateway."""
    settings = {"GATEWAY_ADMIN_TOKEN": ADMIN_TOKEN, "GATEWAY_UPSTREAM_USER_KEY": SANDBOX_USER_KEY}
    with (
        _run_sandbox(folder) as (sandbox, sandbox_url),
        run_gateway(folder, [*_COMMAND, "serve"], **settings, GATEWAY_UPSTREAM_URL=sandbox_url) as gateway,
        Redis(unix_socket_path=str(folder / "valkey.sock")) as store,
    ):
        (store_pid,) = gateway.child_pids
        sampler = Sampler({"gateway": gateway.process.pid, "store": store_pid, "sandbox": sandbox.pid}, store)
        traffic, faults = asyncio.run(_send_traffic(seconds, gateway, sampler, report))
    warm_up = seconds * WARM_UP_SHARE
    samples = [sample for sample in sampler.samples if warm_up <= sample.at <= seconds]
    counts = [count for count in sampler.key_counts if warm_up <= count.at <= seconds]
    return Result(
        seconds,
        sampler.samples,
        sampler.key_counts,
        traffic.requests,
        [*judge_samples(samples), *judge_keys(counts)],
        faults,
    )


@contextmanager
def _run_sandbox(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a sandbox whose account can pay for everything; yield it with its address."""
    command = with_parent_death_signal([*_COMMAND, "sandbox", "--port", "0", "--folder", str(folder / "sandbox")])
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            url = process.stdout.readline().decode().strip()
            behaviour = {"seconds": _TASK_SECONDS, "faults": []}
            HTTP.put(f"{url}/_control/behaviour", json=behaviour).raise_for_status()
            balance = {"count": 10**9, "money": 10**9}
            HTTP.put(f"{url}/_control/accounts/{SANDBOX_USER_KEY}", json=balance).raise_for_status()
            yield process, url
        finally:
            process.terminate()


async def _send_traffic(
    seconds: float, gateway: GatewayProcess, sampler: Sampler, report: Callable[[str], None]
) -> tuple[Traffic, list[str]]:
    limits = httpx2.Limits(max_connections=500, max_keepalive_connections=20)
    async with (
        run_receiver() as receiver,
        httpx2.AsyncClient(trust_env=False, timeout=60, limits=limits) as client,
    ):
        create = _TenantFactory(client, f"{gateway.ops_url}/admin/v1", receiver.url)
        tokens = [await create.tenant(f"tenant-{number}") for number in range(_TENANTS)]
        limited = await create.tenant("limited", limits=[{"window": "total", "tasks": 0}])
        traffic = Traffic(gateway.url, gateway.ops_url, ADMIN_TOKEN, tokens, limited, client)
        running = asyncio.create_task(traffic.run(seconds))
        next_count = 0.0
        while not running.done():
            await asyncio.wait([running], timeout=seconds / _SAMPLES)
            sampler.take(traffic.tasks, traffic.take_latencies())
            last = sampler.samples[-1]
            if last.at >= next_count:
                sampler.count_keys(traffic.tasks)
                next_count += seconds / _KEY_COUNTS
                memory = ", ".join(f"{name} {mb:.0f} MB" for name, mb in last.memory_mb.items())
                report(f"{last.at:4.0f} s  {traffic.requests:,} requests, {traffic.tasks:,} tasks; {memory}")
        await running
        return traffic, [*_find_unexpected(traffic), *await _find_undrained(client, gateway.ops_url)]


@dataclass(frozen=True)
class _TenantFactory:
    client: httpx2.AsyncClient
    url: str
    receiver_url: str

    async def tenant(self, name: str, **policy: Any) -> str:
        """Create a tenant with webhooks; return its token."""
        port = urlsplit(self.receiver_url).port
        webhook = {"url": f"{self.receiver_url}/{name}", "allow": [f"127.0.0.0/8:{port}"]}
        await self._call("PUT", f"/tenants/{name}", {"accounts": [DEMO_NAME], "webhook": webhook, **policy})
        return str((await self._call("POST", f"/tenants/{name}/tokens"))["token"])

    async def _call(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        response = await self.client.request(method, self.url + path, headers=headers, json=body)
        assert response.is_success, response.text
        return response.json()


def _find_unexpected(traffic: Traffic) -> Iterator[str]:
    if traffic.unexpected.total() > traffic.requests * _MAX_UNEXPECTED_SHARE:
        counts = ", ".join(f"{name}: {count}" for name, count in traffic.unexpected.most_common())
        yield f"unexpected responses of {traffic.requests:,}: {counts}"


async def _find_undrained(client: httpx2.AsyncClient, ops_url: str) -> list[str]:
    """Wait until nothing is under way; return what is left."""
    deadline = asyncio.get_running_loop().time() + _DRAIN_SECONDS
    while True:
        text = (await client.get(f"{ops_url}/metrics")).text
        left = [f"left after the end: {name} {value:g}" for name, value in _sum_gauges(text) if value > _DRAINED[name]]
        if not left or asyncio.get_running_loop().time() > deadline:
            return left
        await asyncio.sleep(1)


def _sum_gauges(metrics: str) -> Iterator[tuple[str, float]]:
    for name in _DRAINED:
        values = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", metrics, re.MULTILINE)
        assert values, f"{name} is missing"
        yield name, sum(map(float, values))


def judge_samples(samples: Sequence[Sample]) -> Iterator[Verdict]:
    """Judge memory, descriptors and latencies."""
    for name in samples[0].memory_mb:
        if name == "store":
            # It holds the tasks, so their number decides. The limit is that of OPERATIONS.md.
            used = [(float(sample.tasks), sample.store_mb * 1e6) for sample in samples]
            yield judge("memory of the store", "bytes per task", 2_048, used)
        else:
            memory = [(sample.at, sample.memory_mb[name]) for sample in samples]
            yield judge(f"memory of the {name}", "MB per 10 min", 1, memory, per=_LIMIT_SECONDS)
    for name in samples[0].descriptors:
        descriptors = [(sample.at, float(sample.descriptors[name])) for sample in samples]
        yield judge(f"descriptors of the {name}", "per 10 min", 2, descriptors, per=_LIMIT_SECONDS)
    for action in ("submit", "read", "list"):
        medians = [(sample.at, median(sample.latency_ms[action])) for sample in samples if action in sample.latency_ms]
        usual = median(latency for _, latency in medians)
        shares = [(at, 100 * latency / usual) for at, latency in medians]
        yield judge(f"latency of {action}", "% per 10 min", 100, shares, per=_LIMIT_SECONDS)


def judge_keys(counts: Sequence[KeyCount]) -> Iterator[Verdict]:
    """Judge the keys that never expire, and the sorted sets."""
    endless = [(count.at, float(sum(count.without_ttl.values()))) for count in counts]
    yield judge("keys without a time to live", "per 10 min", 1, endless, per=_LIMIT_SECONDS)
    running = [(count.at, _count_members(count, are_running=True)) for count in counts]
    yield judge("sorted sets of what is under way", "members per 10 min", 10, running, per=_LIMIT_SECONDS)
    stored = [(float(count.tasks), _count_members(count, are_running=False)) for count in counts]
    yield judge("sorted sets of what is stored", "members per task", 1.2, stored)


def _count_members(count: KeyCount, *, are_running: bool) -> float:
    return float(sum(n for name, n in count.sorted_sets.items() if name.startswith(_RUNNING_SETS) is are_running))
