"""Deliveries on a real server: a dead receiver delays no other, and none are lost with a process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from service.domain.webhooks import DeliveryState
from service.storage.connections import connect
from service.storage.deliveries import LEASE_MS, MAX_CONCURRENT, RedisDeliveryQueue
from service.storage.redis import Keys, RedisScripts
from service.usecases.ports import DeliveryResult
from tests.behaviour.gateway_fixture import assert_keys_expire
from tests.support.valkey import Valkey

KEYS = Keys("gw")


class DeliveryStore:
    """A real server with deliveries."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.queue = RedisDeliveryQueue(RedisScripts(client), KEYS)

    async def add_delivery(self, reservation: str, tenant: int, url: str) -> None:
        """Add a delivery that is due."""
        kept = {"task_id": "task_x", "tenant": tenant, "url": url, "state": "failed"}
        packed = msgspec.msgpack.encode(kept | {"created_at": 1, "updated_at": 1, "attempts": 11})
        await self.client.set(KEYS.delivery(reservation), packed, px=LEASE_MS)
        assert await self.queue.redeliver(reservation)

    async def advance_clock(self, milliseconds: int) -> None:
        await self.client.set(KEYS.clock, int(await self.client.get(KEYS.clock)) + milliseconds)


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[DeliveryStore]:
    connections = connect(valkey.url, timeout=5)
    client: Any = connections.commands
    await client.flushall()
    yield DeliveryStore(client)
    await assert_keys_expire(client)
    await connections.aclose()


async def test_failing_receiver(store: DeliveryStore) -> None:
    """After a failure a receiver gets one delivery at a time until one succeeds."""
    for number in range(3 * MAX_CONCURRENT):
        await store.add_delivery(f"d{number}", 1, "https://failing.test/")
    for item in await store.queue.claim(64):
        await store.queue.record_attempt(item, DeliveryResult(state=DeliveryState.PENDING, retry_delay_ms=5_000))
    (alone,) = await store.queue.claim(64)
    await store.queue.record_attempt(alone, DeliveryResult(state=DeliveryState.DELIVERED))
    assert len(await store.queue.claim(64)) == MAX_CONCURRENT


async def test_process_killed(store: DeliveryStore) -> None:
    """An unrecorded delivery is claimed again after its lease ends, and not before."""
    await store.add_delivery("one", 1, "https://hooks.test/")
    (first,) = await store.queue.claim(64)
    await store.advance_clock(LEASE_MS - 1_000)
    assert not await store.queue.claim(64)
    await store.advance_clock(1_000)
    (second,) = await store.queue.claim(64)
    assert second.delivery == first.delivery
    failure = DeliveryResult(state=DeliveryState.FAILED)
    assert not await store.queue.record_attempt(first, failure), "the claim had passed to another process"
    assert await store.queue.record_attempt(first, DeliveryResult(state=DeliveryState.DELIVERED)), (
        "but what is there is there"
    )
    assert not await store.queue.record_attempt(second, failure)
    await store.advance_clock(2 * LEASE_MS)
    assert not await store.queue.claim(64)
