"""The deliveries on a real server: nobody waits for a receiver that is dead, and nothing is lost with a process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from service.domain.webhooks import DeliveryState
from service.storage.connections import connect
from service.storage.deliveries import AT_ONCE, LEASE, RedisAgenda
from service.storage.redis import Keys, Scripts
from service.usecases.ports import Outcome
from tests.behaviour.house import no_key_is_left_for_ever
from tests.support.valkey import Valkey

KEYS = Keys("gw")


class Store:
    """A real server with deliveries."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.agenda = RedisAgenda(Scripts(client), KEYS)

    async def add(self, reservation: str, tenant: int, url: str) -> None:
        """One delivery more that is due."""
        kept = {"task": "task_x", "tenant": tenant, "url": url, "state": "failed"}
        packed = msgspec.msgpack.encode(kept | {"created": 1, "updated": 1, "attempts": 11})
        await self.client.set(KEYS.delivery(reservation), packed, px=LEASE)
        assert await self.agenda.redeliver(reservation)

    async def wait(self, milliseconds: int) -> None:
        """Let time pass for the scripts."""
        await self.client.set(KEYS.clock, int(await self.client.get(KEYS.clock)) + milliseconds)


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[Store]:
    connections = connect(valkey.url, timeout=5)
    client: Any = connections.commands
    await client.flushall()
    yield Store(client)
    await no_key_is_left_for_ever(client)
    await connections.aclose()


async def test_dead_receiver(store: Store) -> None:
    """Of a thousand deliveries to one receiver a few are handed out, and the one of another tenant with them."""
    for number in range(1_000):
        await store.add(f"dead-{number}", 1, f"https://dead.test/{number}")
    await store.add("alive", 2, "https://alive.test/")
    claimed = [each.delivery.reservation for each in await store.agenda.claim(64)]
    assert len(claimed) == AT_ONCE + 1
    assert "alive" in claimed
    assert not await store.agenda.claim(64)
    await store.add("newer", 3, "https://dead.test/")
    assert [each.delivery.reservation for each in await store.agenda.claim(1)] == ["newer"]


async def test_failing_receiver(store: Store) -> None:
    """A receiver that has failed gets one delivery at a time until it takes one."""
    for number in range(3 * AT_ONCE):
        await store.add(f"d{number}", 1, "https://failing.test/")
    for each in await store.agenda.claim(64):
        await store.agenda.record(each, Outcome(state=DeliveryState.PENDING, wait=5_000))
    (alone,) = await store.agenda.claim(64)
    await store.agenda.record(alone, Outcome(state=DeliveryState.DELIVERED))
    assert len(await store.agenda.claim(64)) == AT_ONCE


async def test_process_killed(store: Store) -> None:
    """What a process claimed and never recorded is handed out again once its lease is over, and not before."""
    await store.add("one", 1, "https://hooks.test/")
    (first,) = await store.agenda.claim(64)
    await store.wait(LEASE - 1_000)
    assert not await store.agenda.claim(64)
    await store.wait(1_000)
    (second,) = await store.agenda.claim(64)
    assert second.delivery == first.delivery
    failure = Outcome(state=DeliveryState.FAILED)
    assert not await store.agenda.record(first, failure), "the claim was somebody else's by then"
    assert await store.agenda.record(first, Outcome(state=DeliveryState.DELIVERED)), "but what is there is there"
    assert not await store.agenda.record(second, failure)
    await store.wait(2 * LEASE)
    assert not await store.agenda.claim(64)


async def test_redelivery_of_what_is_under_way(store: Store) -> None:
    """What is being sent just now is not sent a second time beside that."""
    await store.add("one", 1, "https://hooks.test/")
    assert len(await store.agenda.claim(64)) == 1
    assert await store.agenda.redeliver("one")
    assert not await store.agenda.claim(64)
    assert await store.agenda.redeliver("unknown") is None
