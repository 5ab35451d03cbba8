"""A gateway process with a store and an upstream of its own, and many running tasks."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from httpx2 import AsyncClient

from service.domain.tasks import Task
from service.storage.connections import connect
from service.storage.redis import Keys, RedisScripts
from service.storage.tasks import RedisTaskStore
from tests.bench.upstream import run_upstream
from tests.process.gateway import GatewayProcess, run_gateway
from tests.support.images import make_png
from tests.support.tasks import make_retention
from tests.support.valkey import run_valkey

KEYS = Keys("bench")
_CONCURRENCY = 16
_HOUR_MS = 3_600_000
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class BenchGateway:
    """The process under test, its store and the other servers."""

    gateway: GatewayProcess
    upstream: str
    store: Any
    tasks: RedisTaskStore
    http: AsyncClient

    async def submit(self, number: int) -> list[Task]:
        """Submit so many images, and keep their tasks watched, so that they are checked at the full rate."""
        headers = {"Authorization": f"Bearer {self.gateway.token}"}
        gate = asyncio.Semaphore(_CONCURRENCY)

        async def one() -> None:
            async with gate:
                files = {"image": ("a.png", make_png(), "image/png")}
                url = f"{self.gateway.url}/v1/tasks/face-enhance"
                (await self.http.post(url, headers=headers, files=files)).raise_for_status()

        async with asyncio.TaskGroup() as group:
            for _ in range(number):
                group.create_task(one())
        results = []
        async for key in self.store.scan_iter(KEYS.task("*"), count=1_000):
            reservation = key.decode().removeprefix(KEYS.task(""))
            await self.store.set(KEYS.poll_watched(reservation), "", px=_HOUR_MS)
            task = await self.tasks.get(reservation)
            assert task
            results.append(task[0])
        return results

    @property
    def cpu_seconds(self) -> float:
        """The CPU time of the process so far."""
        fields = Path(f"/proc/{self.gateway.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    @property
    def resident_mib(self) -> float:
        """The resident memory of the process."""
        status = Path(f"/proc/{self.gateway.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) / 1024

    async def wait_for_waiters(self, number: int) -> None:
        """Wait until so many clients wait."""
        until = time.monotonic() + 60
        while f"\ngateway_waiting_clients {number}.0" not in (await self.http.get(self.metrics_url)).text:
            assert time.monotonic() < until, "the clients did not come to wait"
            await asyncio.sleep(0.1)

    @property
    def metrics_url(self) -> str:
        return f"{self.gateway.ops_url}/metrics"


@asynccontextmanager
async def run_bench_gateway(
    *, role: str, latency: float, state: str = "Running", **settings: str
) -> AsyncIterator[BenchGateway]:
    """Run a gateway with an upstream of this latency that reports this state of each task."""
    async with AsyncExitStack() as stack:
        store = stack.enter_context(run_valkey())
        address = stack.enter_context(run_upstream(latency, state))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base_settings = {
            "GATEWAY_REDIS_URL": store.url,
            "GATEWAY_KEY_PREFIX": "bench",
            "GATEWAY_UPSTREAM_URL": address,
            "GATEWAY_UPSTREAM_USER_KEY": "key",
            "GATEWAY_ROLE": role,
            "GATEWAY_LOG_LEVEL": "warning",
        }
        gateway = stack.enter_context(run_gateway(folder, **base_settings, **settings))
        connections = connect(store.url, timeout=60)
        stack.push_async_callback(connections.aclose)
        tasks = RedisTaskStore(RedisScripts(connections.commands), KEYS, make_retention())
        http = await stack.enter_async_context(AsyncClient(timeout=60, trust_env=False))
        yield BenchGateway(gateway, address, connections.commands, tasks, http)
