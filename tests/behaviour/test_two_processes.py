"""What one process records wakes those who wait in another, long before anybody would look by himself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest

from service.app import create_app
from service.container import assembled
from service.domain.tasks import Kind
from service.settings import Settings
from service.storage.connections import connect
from service.storage.redis import Keys
from tests.behaviour.following import following, until, waiting
from tests.behaviour.house import ENVIRONMENT, House, real_house
from tests.support.serving import serving
from tests.support.valkey import Valkey

POLL_SECONDS = 60
"""How often a process looks at the store by itself for those who wait: not while a test lasts."""


@dataclass
class Pair:
    """A process that watches, and one that only answers."""

    watching: House
    answering: House


@pytest.fixture
async def pair(valkey: Valkey) -> AsyncIterator[Pair]:
    """Both processes at work over one store."""
    async with AsyncExitStack() as stack:
        own = await stack.enter_async_context(real_house(valkey))
        given = {
            "GATEWAY_REDIS_URL": valkey.url,
            "GATEWAY_UPSTREAM_URL": "http://127.0.0.1:9",
            "GATEWAY_ROLE": "api",
            "GATEWAY_POLL_SECONDS": str(POLL_SECONDS),
        }
        apart = await stack.enter_async_context(assembled(Settings.load(ENVIRONMENT | given)))
        url = await stack.enter_async_context(serving(create_app(apart)))
        await stack.enter_async_context(apart.working())
        connections = connect(valkey.url, timeout=5)
        stack.push_async_callback(connections.aclose)
        channel = Keys("gw").changes_channel
        async with asyncio.timeout(20):
            while not apart.registry.ready or dict(await connections.commands.pubsub_numsub(channel)) != {
                channel.encode(): 1
            }:
                await asyncio.sleep(0.001)
        yield Pair(own, House(url, own.ops_url, own.http, apart, own.upstream, own.pass_time, own.token))


async def test_woken_from_elsewhere(pair: Pair) -> None:
    """A wait and a stream are told the end that another process records, at once."""
    task = (await pair.watching.submit()).json()
    reading = await waiting(pair.answering, task["links"]["self"])
    async with following(pair.answering, task) as stream:
        await stream.next()
        assert pair.answering.services.board.waiting == 2
        await pair.watching.watch()
        recorded = time.monotonic()
        assert [event.task["state"] for event in await stream.rest()] == ["succeeded"]
    assert (await reading).json()["state"] == "succeeded"
    assert time.monotonic() - recorded < POLL_SECONDS / 10


async def test_known_from_elsewhere(pair: Pair) -> None:
    """What a process remembers of a task is brought up to date by what another one records."""
    task = (await pair.watching.submit()).json()
    read = await pair.answering.call("GET", task["links"]["self"])
    assert read.json()["state"] == "queued"
    board = pair.answering.services.board
    (reservation,) = board._seen
    await pair.watching.watch()
    await until(lambda: board._seen[reservation].task.state.ended)
    assert (await pair.answering.call("GET", task["links"]["self"])).json()["state"] == "succeeded"
    assert list(board.pace._seconds) == [Kind.FACE_ENHANCE]
