"""Task events reach all processes at once, also after a lost connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from service.domain.tasks import State
from service.storage import redis
from service.storage.connections import connect
from service.storage.redis import Subscriber
from service.storage.tasks import put_task_event
from service.usecases.caches import DurationEstimator, TaskCache
from service.usecases.ports import CheckOutcome
from tests.storage.store_fixture import KEYS, StoreFixture, open_store
from tests.support.valkey import Valkey, reserve_port, run_valkey

TIMEOUT_SECONDS = 20.0


@pytest.fixture(scope="module")
def own_server() -> Iterator[Valkey]:
    """Yield a server whose connections may be cut."""
    with run_valkey() as server:
        yield server


@pytest.fixture
async def task_store(own_server: Valkey, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StoreFixture]:
    """Yield a tenant with one running task."""
    monkeypatch.setattr(redis, "RECONNECT_SECONDS", 0.01)
    async with open_store(own_server.url) as store:
        await store.accept_tasks("r1")
        yield store


async def count_subscribers(client: Redis) -> int:
    ((_, number),) = await client.pubsub_numsub(KEYS.task_events_channel)
    return int(number)


async def subscriber_ids(client: Redis) -> set[str]:
    return {item["id"] for item in await client.client_list(_type="pubsub")}


@asynccontextmanager
async def open_cache(url: str, client: Redis | None = None) -> AsyncIterator[TaskCache]:
    """Open the task cache of another process, subscribed to the task events."""
    cache, connections = TaskCache(DurationEstimator(2.5)), connect(url, timeout=5)
    subscriber = Subscriber(connections.open_pubsub, KEYS.task_events_channel, partial(put_task_event, cache))
    following = asyncio.create_task(subscriber.run())
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while client and not await count_subscribers(client):
                await asyncio.sleep(0)
        yield cache
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await connections.aclose()


async def test_wakes_subscribers(own_server: Valkey, task_store: StoreFixture) -> None:
    """A change wakes subscribers in another process, with the recorded task."""
    async with open_cache(own_server.url, task_store.client) as cache:
        with cache.subscribe("r1") as subscription:
            recorded = await task_store.check_due_task(CheckOutcome.RUNNING)
            first = await subscription.wait_for_change(1, TIMEOUT_SECONDS)
            assert first
            assert first.task == recorded
            await task_store.check_due_task(CheckOutcome.RUNNING, CheckOutcome.SUCCEEDED)
            last = await subscription.wait_for_change(first.task.version, TIMEOUT_SECONDS)
        assert last
        assert (last.task.version, last.task.state) == (3, State.SUCCEEDED)
        assert abs(last.known_at - await task_store.now()) < TIMEOUT_SECONDS * 1000


async def test_only_visible_changes(task_store: StoreFixture) -> None:
    """Checks without a visible change are not published."""
    subscription = await task_store.connections.open_pubsub()
    async with subscription as channel:
        await channel.subscribe(KEYS.task_events_channel)
        await task_store.check_due_task(*[CheckOutcome.RUNNING] * 3, CheckOutcome.NO_RESPONSE, CheckOutcome.SUCCEEDED)
        messages: list[dict[str, Any]] = []
        while len(messages) < 3:
            message = await channel.get_message(timeout=TIMEOUT_SECONDS)
            assert message
            messages.append(message)
    versions = [msgspec.msgpack.decode(item["data"])[2]["version"] for item in messages if item["type"] == "message"]
    assert versions == [2, 3]


async def test_lost_connection(own_server: Valkey, task_store: StoreFixture) -> None:
    """A lost connection is replaced, and events are received again."""
    async with open_cache(own_server.url, task_store.client) as cache:
        with cache.subscribe("r1") as subscription:
            (lost,) = await subscriber_ids(task_store.client)
            await task_store.client.client_kill_filter(_id=lost)
            async with asyncio.timeout(TIMEOUT_SECONDS):
                while await subscriber_ids(task_store.client) in (set(), {lost}) or not await count_subscribers(
                    task_store.client
                ):
                    await asyncio.sleep(0)
            await task_store.check_due_task(CheckOutcome.SUCCEEDED)
            event = await subscription.wait_for_change(1, TIMEOUT_SECONDS)
    assert event
    assert event.task.state is State.SUCCEEDED


async def test_invalid_message(own_server: Valkey, task_store: StoreFixture) -> None:
    """A message of another gateway version is skipped, and the next one is received."""
    async with open_cache(own_server.url, task_store.client) as cache:
        with cache.subscribe("r1") as subscription:
            for odd in (b"", b"\xc1", b"\x93\xa2r1\x01\x80"):
                await task_store.client.publish(KEYS.task_events_channel, odd)
            await task_store.check_due_task(CheckOutcome.SUCCEEDED)
            assert await subscription.wait_for_change(1, TIMEOUT_SECONDS)


async def test_a_store_that_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who begins while the store is away hears of changes as soon as it is there."""
    monkeypatch.setattr(redis, "RECONNECT_SECONDS", 0.01)
    port = reserve_port()
    url = f"redis://127.0.0.1:{port}"
    async with open_cache(url) as cache:
        with cache.subscribe("r1") as subscription, run_valkey(port=port) as late:
            async with open_store(late.url) as other:
                await other.accept_tasks("r1")
                async with asyncio.timeout(TIMEOUT_SECONDS):
                    while not await count_subscribers(other.client):
                        await asyncio.sleep(0)
                await other.check_due_task(CheckOutcome.SUCCEEDED)
                assert await subscription.wait_for_change(1, TIMEOUT_SECONDS)
