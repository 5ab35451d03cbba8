"""The store is killed in the middle of a submission, and started again on what it had acknowledged."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.behaviour.house import real_house
from tests.behaviour.upstreams import SandboxControl
from tests.chaos.test_store_away import arrived, counters, until
from tests.support.valkey import Valkey, running


@contextmanager
def restarted(store: Valkey) -> Iterator[None]:
    """The same server again, on the same data."""
    with subprocess.Popen(store.process.args, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


async def answers(store: Valkey) -> bool:
    """Whether the server has read its data."""
    with Redis(unix_socket_path=str(store.path)) as client:
        try:
            return bool(client.ping())
        except RedisConnectionError:
            return False


async def test_killed_when_settling() -> None:
    """An acceptance that could not be booked before the store was killed is booked once after its restart."""
    with running("--appendonly", "yes", "--appendfsync", "always") as store, ExitStack() as again:
        async with real_house(store) as house:
            assert isinstance(house.upstream, SandboxControl)
            await house.put_tenant(limits=[{"window": "total", "tasks": 2}], max_active=2)
            assert (await house.submit()).status_code == 201
            await house.upstream.answer_after(0.3)
            submitting = asyncio.create_task(house.submit())
            await arrived(house, 2)
            store.kill()
            accepted = await submitting
            assert accepted.status_code == 201
            assert (await house.submit()).json()["code"] == "ledger-unavailable"

            again.enter_context(restarted(store))
            await until(lambda: answers(store))

            async def booked() -> bool:
                listed = (await house.call("GET", "/v1/tasks")).json()["items"]
                return accepted.json()["id"] in {each["id"] for each in listed}

            await until(booked)
            assert (await house.submit()).json()["code"] == "quota-exceeded"
            assert (await counters(house)).active == 2
            assert await house.upstream.submits() == 2
