"""Subscriptions reach all processes at once and reconnect for as long as Redis is away; outages are logged once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from service.domain.errors import LedgerUnavailable
from service.domain.tasks import State
from service.storage import redis
from service.storage.connections import connect
from service.storage.redis import Keys, RedisMonitor, RedisScripts, Subscriber
from service.storage.tasks import put_task_event
from service.telemetry.metrics import Metrics, RedisErrorKind, RedisOutcome
from service.usecases.caches import DurationEstimator, TaskCache
from service.usecases.ports import CheckOutcome
from tests.storage.seeded_store import SeededStore, open_seeded_store
from tests.support.network import reserve_port
from tests.support.valkey import Valkey, run_valkey

RUNNING, NO_RESPONSE, SUCCEEDED = CheckOutcome.RUNNING, CheckOutcome.NO_RESPONSE, CheckOutcome.SUCCEEDED
TIMEOUT_SECONDS = 20.0
CHANNEL = Keys("plain").task_events_channel


@pytest.fixture(scope="module")
def own_server() -> Iterator[Valkey]:
    """Yield a server whose connections may be cut."""
    with run_valkey() as server:
        yield server


@pytest.fixture
async def store(own_server: Valkey, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SeededStore]:
    """Yield a store with one running task."""
    monkeypatch.setattr(redis, "RECONNECT_SECONDS", 0.01)
    async with open_seeded_store(own_server.url) as store:
        await store.accept("r1")
        yield store


async def read_subscriber_ids(store: SeededStore) -> set[str]:
    """Return the connections that are subscribed to the task events."""
    ids = {item["id"] for item in await store.client.client_list(_type="pubsub")}
    ((_, count),) = await store.client.pubsub_numsub(CHANNEL)
    return ids if count else set()


async def wait_for_subscriber(store: SeededStore, lost: frozenset[str] = frozenset()) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not await read_subscriber_ids(store) - lost:
            await asyncio.sleep(0)


@asynccontextmanager
async def open_cache(url: str) -> AsyncIterator[TaskCache]:
    """Open the task cache of another process, subscribed to the task events."""
    cache, connections = TaskCache(DurationEstimator(2.5)), connect(url, timeout=5)
    subscriber = Subscriber(connections.open_pubsub, CHANNEL, partial(put_task_event, cache))
    following = asyncio.create_task(subscriber.run())
    try:
        yield cache
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await connections.aclose()


async def test_changes_are_received(own_server: Valkey, store: SeededStore) -> None:
    """Visible changes wake subscribers in another process with the recorded task; odd messages are skipped."""
    async with open_cache(own_server.url) as cache:
        await wait_for_subscriber(store)
        async with await store.connections.open_pubsub() as channel:
            await channel.subscribe(CHANNEL)
            assert (await channel.get_message(timeout=TIMEOUT_SECONDS) or {})["type"] == "subscribe"
            with cache.subscribe("r1") as subscription:
                recorded = await store.check_due_task(RUNNING)
                first = await subscription.wait_for_change(1, TIMEOUT_SECONDS)
                assert first
                assert first.task == recorded
                for odd in (b"", b"\xc1", b"\x93\xa2r1\x01\x80"):
                    await store.client.publish(CHANNEL, odd)
                await store.check_due_task(RUNNING, RUNNING, NO_RESPONSE, SUCCEEDED)
                last = await subscription.wait_for_change(first.task.version, TIMEOUT_SECONDS)
            assert last
            assert (last.task.version, last.task.state, last.known_at) == (3, State.SUCCEEDED, store.now)
            for _ in range(5):
                assert await channel.get_message(timeout=TIMEOUT_SECONDS)
            assert await channel.get_message(timeout=0.01) is None


async def test_lost_connection(own_server: Valkey, store: SeededStore) -> None:
    """A lost connection is replaced, and events are received again."""
    async with open_cache(own_server.url) as cache:
        await wait_for_subscriber(store)
        with cache.subscribe("r1") as subscription:
            lost = await read_subscriber_ids(store)
            await store.client.client_kill_filter(_id=lost.copy().pop())
            await wait_for_subscriber(store, frozenset(lost))
            await store.check_due_task(SUCCEEDED)
            assert await subscription.wait_for_change(1, TIMEOUT_SECONDS)


class ReportingMonitor(RedisMonitor):
    """A monitor that also reports each error."""

    def __init__(self) -> None:
        super().__init__(Metrics(CollectorRegistry()))
        self.failures = asyncio.Queue[RedisErrorKind]()

    def record_error(self, error: RedisErrorKind) -> None:
        self.failures.put_nowait(error)


async def test_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subscription that begins or continues while the store is away is heard when it is back, and logs nothing."""
    monkeypatch.setattr(redis, "RECONNECT_SECONDS", 0.01)
    port, monitor, received = reserve_port(), ReportingMonitor(), asyncio.Event()
    connections = connect(f"redis://127.0.0.1:{port}", timeout=5)

    async def handle(message: bytes | None) -> None:
        if message == b"message":
            received.set()

    with capture_logs() as logs:
        following = asyncio.create_task(Subscriber(connections.open_pubsub, "channel", handle, monitor).run())
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                for _ in range(2):
                    for _ in range(3):
                        await monitor.failures.get()
                    with run_valkey(port=port):
                        while not received.is_set():
                            await connections.commands.publish("channel", b"message")
                            await asyncio.sleep(0.01)
                    received.clear()
                    while not monitor.failures.empty():
                        monitor.failures.get_nowait()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await connections.aclose()
    assert logs == []


async def test_outage_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line at the start and one at the end, whatever fails in between."""
    monkeypatch.setattr(redis, "QUIET_SECONDS", 0)
    port, metrics = reserve_port(), Metrics(CollectorRegistry())
    connections = connect(f"redis://127.0.0.1:{port}", timeout=5)
    monitor = RedisMonitor(metrics)
    reader = RedisScripts(connections.commands, monitor=monitor)
    with capture_logs() as logs:
        for _ in range(2):
            failed = await asyncio.gather(*(reader.read(("GET", "x")) for _ in range(20)), return_exceptions=True)
            assert all(isinstance(item, LedgerUnavailable) for item in failed)
            monitor.record_error(RedisErrorKind.CONNECTION)
            with run_valkey(port=port):
                await asyncio.gather(*(reader.read(("GET", "x")) for _ in range(20)))
    await connections.aclose()
    assert [log["event"] for log in logs] == ["redis.unavailable", "redis.available"] * 2
    assert [log.get("failed_calls") for log in logs] == [None, 20, None, 20]
    assert metrics.registry.get_sample_value("gateway_redis_errors_total", {"error": "connection"}) == 42
    for outcome in ("unavailable", "ok"):
        labels = {"command": "read", "outcome": outcome}
        assert metrics.registry.get_sample_value("gateway_redis_calls_total", labels) == 40


def test_outage_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Successful calls among failing ones do not end an outage; an error response starts one too."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monitor = RedisMonitor(Metrics(CollectorRegistry()))
    with capture_logs() as logs:
        for _ in range(100):
            monitor.record_error(RedisErrorKind.RESPONSE)
            monitor.record_call("reserve", RedisOutcome.UNAVAILABLE, 0)
            monitor.record_call("reserve", RedisOutcome.OK, 0)
            now += 0.5
        now += redis.QUIET_SECONDS
        for outcome in (RedisOutcome.ERROR, RedisOutcome.OK, RedisOutcome.ERROR):
            if outcome is RedisOutcome.ERROR:
                monitor.record_error(RedisErrorKind.RESPONSE)
            monitor.record_call("reserve", outcome, 0)
    assert [log["event"] for log in logs] == ["redis.unavailable", "redis.available"]
