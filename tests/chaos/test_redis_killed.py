"""The store is killed during a submission, and restarted with its acknowledged data."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.behaviour.gateway_fixture import run_real_gateway
from tests.behaviour.upstream_control import SandboxUpstreamControl
from tests.chaos.test_redis_outage import read_counters, wait_for_submits, wait_until
from tests.support.valkey import Valkey, run_valkey


@contextmanager
def restart_store(store: Valkey) -> Iterator[None]:
    """Restart the server on the same data."""
    with subprocess.Popen(store.process.args, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


async def is_ready(store: Valkey) -> bool:
    """Return whether the server has loaded its data."""
    with Redis(unix_socket_path=str(store.socket_path)) as client:
        try:
            return bool(client.ping())
        except RedisConnectionError:
            return False


async def test_killed_when_settling() -> None:
    """An acceptance that could not be settled before the store was killed is settled once after its restart."""
    with run_valkey("--appendonly", "yes", "--appendfsync", "always") as store, ExitStack() as again:
        async with run_real_gateway(store) as gateway:
            assert isinstance(gateway.upstream, SandboxUpstreamControl)
            await gateway.put_tenant(limits=[{"window": "total", "tasks": 2}], max_active=2)
            assert (await gateway.submit()).status_code == 201
            await gateway.upstream.delay_next_response(0.3)
            submitting = asyncio.create_task(gateway.submit())
            await wait_for_submits(gateway, 2)
            store.kill()
            accepted = await submitting
            assert accepted.status_code == 201
            assert (await gateway.submit()).json()["code"] == "ledger-unavailable"

            again.enter_context(restart_store(store))
            await wait_until(lambda: is_ready(store))

            async def booked() -> bool:
                listed = (await gateway.call("GET", "/v1/tasks")).json()["items"]
                return accepted.json()["id"] in {item["id"] for item in listed}

            await wait_until(booked)
            assert (await gateway.submit()).json()["code"] == "quota-exceeded"
            assert (await read_counters(gateway)).active_tasks == 2
            assert await gateway.upstream.count_submits() == 2
