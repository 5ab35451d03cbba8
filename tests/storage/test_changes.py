"""What one process records is known to all at once, also after the connection was lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from service.domain.tasks import State
from service.storage import tasks
from service.storage.connections import connect
from service.storage.tasks import Changes, unpacked_change
from service.usecases.ports import Answered
from service.usecases.task_cache import Board, Pace
from tests.storage.shop import KEYS, Shop, shop
from tests.support.valkey import Valkey, free_port, running

PATIENCE = 20.0


@pytest.fixture(scope="module")
def own() -> Iterator[Valkey]:
    """A server on which connections may be cut."""
    with running() as server:
        yield server


@pytest.fixture
async def kept(own: Valkey, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shop]:
    """A tenant with one running task."""
    monkeypatch.setattr(tasks, "AWAY_SECONDS", 0.01)
    async with shop(own.url) as found:
        await found.accept("r1")
        yield found


async def listeners(client: Redis) -> int:
    """How many listen on the channel of changes."""
    ((_, number),) = await client.pubsub_numsub(KEYS.changes_channel)
    return int(number)


async def listening_ids(client: Redis) -> set[str]:
    """The connections that listen to anything."""
    return {each["id"] for each in await client.client_list(_type="pubsub")}


@asynccontextmanager
async def listening(url: str, client: Redis | None = None) -> AsyncIterator[Board]:
    """The board of another process, on which changes are posted as they come."""
    board, connections = Board(Pace(2.5)), connect(url, timeout=5)
    following = asyncio.create_task(Changes(connections.subscriber, KEYS.changes_channel, board).follow())
    try:
        async with asyncio.timeout(PATIENCE):
            while client and not await listeners(client):
                await asyncio.sleep(0)
        yield board
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await connections.aclose()


async def test_told_to_all(own: Valkey, kept: Shop) -> None:
    """A change wakes who waits for it in another process, with the task as it was recorded."""
    async with listening(own.url, kept.client) as board:
        with board.watching("r1") as watcher:
            recorded = await kept.check(Answered.RUNNING)
            first = await watcher.changed(1, PATIENCE)
            assert first
            assert first.task == recorded
            await kept.check(Answered.RUNNING, Answered.SUCCEEDED)
            last = await watcher.changed(first.task.version, PATIENCE)
        assert last
        assert (last.task.version, last.task.state) == (3, State.SUCCEEDED)
        assert abs(last.now - await kept.now()) < PATIENCE * 1000


async def test_only_what_can_be_seen(kept: Shop) -> None:
    """Checks that change nothing are not announced."""
    subscription = await kept.connections.subscriber()
    async with subscription as channel:
        await channel.subscribe(KEYS.changes_channel)
        await kept.check(*[Answered.RUNNING] * 3, Answered.NOTHING, Answered.SUCCEEDED)
        heard: list[dict[str, Any]] = []
        while len(heard) < 3:
            message = await channel.get_message(timeout=PATIENCE)
            assert message
            heard.append(message)
    versions = [unpacked_change(each["data"])[0].version for each in heard if each["type"] == "message"]
    assert versions == [2, 3]


async def test_a_lost_connection(own: Valkey, kept: Shop) -> None:
    """When the connection is lost a new one is made, and changes are heard again."""
    async with listening(own.url, kept.client) as board:
        with board.watching("r1") as watcher:
            (lost,) = await listening_ids(kept.client)
            await kept.client.client_kill_filter(_id=lost)
            async with asyncio.timeout(PATIENCE):
                while await listening_ids(kept.client) in (set(), {lost}) or not await listeners(kept.client):
                    await asyncio.sleep(0)
            await kept.check(Answered.SUCCEEDED)
            seen = await watcher.changed(1, PATIENCE)
    assert seen
    assert seen.task.state is State.SUCCEEDED


async def test_what_can_not_be_read(own: Valkey, kept: Shop) -> None:
    """An announcement of another version of the gateway is passed over, and the next one is heard."""
    async with listening(own.url, kept.client) as board:
        with board.watching("r1") as watcher:
            for odd in (b"", b"\xc1", b"\x93\xa2r1\x01\x80"):
                await kept.client.publish(KEYS.changes_channel, odd)
            await kept.check(Answered.SUCCEEDED)
            assert await watcher.changed(1, PATIENCE)


async def test_a_store_that_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who begins while the store is away hears of changes as soon as it is there."""
    monkeypatch.setattr(tasks, "AWAY_SECONDS", 0.01)
    port = free_port()
    url = f"redis://127.0.0.1:{port}"
    async with listening(url) as board:
        with board.watching("r1") as watcher, running(port=port) as late:
            async with shop(late.url) as other:
                await other.accept("r1")
                async with asyncio.timeout(PATIENCE):
                    while not await listeners(other.client):
                        await asyncio.sleep(0)
                await other.check(Answered.SUCCEEDED)
                assert await watcher.changed(1, PATIENCE)
