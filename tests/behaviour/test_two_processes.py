"""Notifications between processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest

from service.app import create_app
from service.container import open_container
from service.domain.tasks import Kind
from service.settings import Settings
from service.storage.connections import connect
from service.storage.redis import Keys
from tests.behaviour.gateway_fixture import ENVIRONMENT, RunningGateway, run_real_gateway
from tests.behaviour.task_readers import open_event_stream, start_waiting_read, wait_until
from tests.support.app_server import serve_app
from tests.support.valkey import Valkey

POLL_SECONDS = 60
"""Longer than a test: waiters are woken by notifications only."""


@dataclass
class TwoProcesses:
    """Two processes, of which only one polls."""

    poller: RunningGateway
    reader: RunningGateway


@pytest.fixture
async def processes(valkey: Valkey) -> AsyncIterator[TwoProcesses]:
    async with AsyncExitStack() as stack:
        own = await stack.enter_async_context(run_real_gateway(valkey))
        environment = {
            "GATEWAY_REDIS_URL": valkey.url,
            "GATEWAY_UPSTREAM_URL": "http://127.0.0.1:9",
            "GATEWAY_ROLE": "api",
            "GATEWAY_POLL_SECONDS": str(POLL_SECONDS),
        }
        apart = await stack.enter_async_context(open_container(Settings.load(ENVIRONMENT | environment)))
        url = await stack.enter_async_context(serve_app(create_app(apart)))
        await stack.enter_async_context(apart.run_jobs())
        connections = connect(valkey.url, timeout=5)
        stack.push_async_callback(connections.aclose)
        channel = Keys("gw").task_events_channel
        async with asyncio.timeout(20):
            while not apart.registry.is_ready or dict(await connections.commands.pubsub_numsub(channel)) != {
                channel.encode(): 1
            }:
                await asyncio.sleep(0.001)
        yield TwoProcesses(
            own, RunningGateway(url, own.ops_url, own.http, apart, own.upstream, own.advance_time, own.token)
        )


async def test_end_recorded_elsewhere_wakes_waiters(processes: TwoProcesses) -> None:
    task = (await processes.poller.submit()).json()
    reading = await start_waiting_read(processes.reader, task["links"]["self"])
    async with open_event_stream(processes.reader, task) as stream:
        await stream.next_event()
        assert processes.reader.services.task_cache.subscription_count == 2
        await processes.poller.poll_due_tasks()
        recorded = time.monotonic()
        assert [event.task["state"] for event in await stream.read_remaining()] == ["succeeded"]
    assert (await reading).json()["state"] == "succeeded"
    assert time.monotonic() - recorded < POLL_SECONDS / 10


async def test_change_recorded_elsewhere_updates_the_cache(processes: TwoProcesses) -> None:
    task = (await processes.poller.submit()).json()
    read = await processes.reader.call("GET", task["links"]["self"])
    assert read.json()["state"] == "queued"
    cache = processes.reader.services.task_cache
    (reservation,) = cache._tasks
    await processes.poller.poll_due_tasks()
    await wait_until(lambda: cache._tasks[reservation].task.state.is_final)
    assert (await processes.reader.call("GET", task["links"]["self"])).json()["state"] == "succeeded"
    assert list(cache.durations._seconds) == [Kind.FACE_ENHANCE]
