"""Subscriptions reach all processes at once and reconnect for as long as Redis is away; outages are logged once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

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
from service.usecases.ports import CheckOutcome, CheckResult
from tests.storage.seeded_store import SeededStore, open_seeded_store
from tests.support.network import reserve_port
from tests.support.valkey import Valkey, run_valkey

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


async def test_changes_are_received(own_server: Valkey, store: SeededStore) -> None:
    """Visible changes wake subscribers in another process with the recorded task; odd messages are skipped.

    A lost connection is replaced.
    """
    cache, connections, received = (
        TaskCache(DurationEstimator(2.5)),
        connect(own_server.url, timeout=5),
        asyncio.Event(),
    )

    async def handle(message: bytes | None) -> None:
        await put_task_event(cache, message)
        if message is not None:
            received.set()

    async def wait_until_subscribed() -> None:
        received.clear()
        while not received.is_set():
            await store.client.publish(CHANNEL, b"\xc1")

    following = asyncio.create_task(Subscriber(connections.open_pubsub, CHANNEL, handle).run())
    try:
        await wait_until_subscribed()
        with cache.subscribe("r1") as subscription:
            recorded = await store.record_check(CheckResult(outcome=CheckOutcome.RUNNING))
            first = await subscription.wait_for_change(1, TIMEOUT_SECONDS)
            assert first
            assert first.task == recorded
            for odd in (b"", b"\x93\xa2r1\x01\x80"):
                await store.client.publish(CHANNEL, odd)
            await store.client.client_kill_filter(_type="pubsub")
            await wait_until_subscribed()
            await store.record_check(CheckResult(outcome=CheckOutcome.SUCCEEDED))
            last = await subscription.wait_for_change(first.task.version, TIMEOUT_SECONDS)
        assert last
        assert (last.task.version, last.task.state, last.known_at) == (3, State.SUCCEEDED, store.now)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await connections.aclose()


async def test_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subscription that begins or continues while the store is away is heard when it is back."""
    monkeypatch.setattr(redis, "RECONNECT_SECONDS", 0.01)
    port, metrics, received = reserve_port(), Metrics(CollectorRegistry()), asyncio.Event()
    connections = connect(f"redis://127.0.0.1:{port}", timeout=5)

    async def handle(message: bytes | None) -> None:
        if message == b"message":
            received.set()

    def count_errors() -> float:
        return metrics.registry.get_sample_value("gateway_redis_errors_total", {"error": "connection"}) or 0

    following = asyncio.create_task(Subscriber(connections.open_pubsub, "channel", handle, RedisMonitor(metrics)).run())
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            for _ in range(2):
                before = count_errors()
                while count_errors() < before + 2:
                    await asyncio.sleep(0.01)
                with run_valkey(port=port):
                    while not received.is_set():
                        await connections.commands.publish("channel", b"message")
                        await asyncio.sleep(0.01)
                received.clear()
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await connections.aclose()


async def test_outage_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line at the start and one at the end, whatever fails in between."""
    monkeypatch.setattr(redis, "QUIET_SECONDS", 0)
    port, metrics = reserve_port(), Metrics(CollectorRegistry())
    connections = connect(f"redis://127.0.0.1:{port}", timeout=5)
    reader = RedisScripts(connections.commands, monitor=RedisMonitor(metrics))
    with capture_logs() as logs:
        for _ in range(2):
            failed = await asyncio.gather(*(reader.read(("GET", "x")) for _ in range(20)), return_exceptions=True)
            assert all(isinstance(item, LedgerUnavailable) for item in failed)
            with run_valkey(port=port):
                await asyncio.gather(*(reader.read(("GET", "x")) for _ in range(20)))
    await connections.aclose()
    assert [log["event"] for log in logs] == ["redis.unavailable", "redis.available"] * 2
    assert metrics.registry.get_sample_value("gateway_redis_errors_total", {"error": "connection"}) == 40
    for outcome in ("unavailable", "ok"):
        labels = {"command": "read", "outcome": outcome}
        assert metrics.registry.get_sample_value("gateway_redis_calls_total", labels) == 40


def test_outage_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Successful calls among failing ones do not end an outage; an error response starts none."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monitor = RedisMonitor(Metrics(CollectorRegistry()))
    with capture_logs() as logs:
        for _ in range(3):
            monitor.record_call("reserve", RedisOutcome.UNAVAILABLE, 0)
            monitor.record_call("reserve", RedisOutcome.OK, 0)
            now += 0.5
        now += redis.QUIET_SECONDS
        for outcome in (RedisOutcome.ERROR, RedisOutcome.OK, RedisOutcome.ERROR):
            monitor.record_call("reserve", outcome, 0)
            monitor.record_error(RedisErrorKind.RESPONSE)
    assert [log["event"] for log in logs] == ["redis.unavailable", "redis.available"]
