"""Subscriptions reconnect for as long as Redis is unavailable, and an outage is logged once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import pytest
from structlog.testing import capture_logs

from service.domain.errors import LedgerUnavailable
from service.storage import redis
from service.storage.connections import Connections, connect
from service.storage.redis import OnError, OutageLogger, RedisScripts
from service.storage.registry import CachedRegistry, RedisRegistry
from service.storage.tasks import TaskEventSubscriber
from service.telemetry.metrics import RedisErrorKind, RedisOutcome
from service.usecases.caches import DurationEstimator, TaskCache
from tests.storage.store_fixture import KEYS
from tests.support.valkey import find_free_port, run_valkey

TIMEOUT_SECONDS = 20.0
_FAILURES = 5


class Subscriber(Protocol):
    """Follows announcements until cancelled."""

    async def run(self) -> None: ...


MakeSubscriber = Callable[[Connections, OnError], Subscriber]


def _make_task_events(connections: Connections, failed: OnError) -> Subscriber:
    return TaskEventSubscriber(
        connections.open_pubsub, KEYS.task_events_channel, TaskCache(DurationEstimator(2.5)), on_error=failed
    )


def _make_registry(connections: Connections, failed: OnError) -> Subscriber:
    store = RedisRegistry(RedisScripts(connections.commands), KEYS)
    return CachedRegistry(store, connections.open_pubsub, KEYS.registry_channel, on_error=failed)


@pytest.mark.parametrize("make", [_make_task_events, _make_registry])
async def test_an_outage_is_followed_through(make: MakeSubscriber, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is tried while the store is away, it is heard again when it is back, and logs nothing itself."""
    monkeypatch.setattr(redis, "RECONNECT_SECONDS", 0.01)
    port, failures = find_free_port(), asyncio.Queue[RedisErrorKind]()
    connections = connect(f"redis://127.0.0.1:{port}", timeout=5)
    with capture_logs() as logs:
        follower = make(connections, failures.put_nowait)
        following = asyncio.create_task(follower.run())
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await _wait_for_failures(failures)
                assert logs == []
                with run_valkey(port=port):
                    await _wait_for_message(connections, follower, logs)
                await _wait_for_failures(failures)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await connections.aclose()


async def test_outage_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line at the start and one at the end, whatever fails in between."""
    monkeypatch.setattr(redis, "QUIET_SECONDS", 0)
    port, counted, calls = find_free_port(), list[RedisErrorKind](), list[RedisOutcome]()
    connections = connect(f"redis://127.0.0.1:{port}", timeout=5)
    outages = OutageLogger(lambda _, outcome, __: calls.append(outcome), counted.append)
    reader = RedisScripts(connections.commands, on_call=outages.on_call, on_error=outages.on_error)
    with capture_logs() as logs:
        for _ in range(2):
            failed = await asyncio.gather(*(reader.read(("GET", "x")) for _ in range(20)), return_exceptions=True)
            assert all(isinstance(item, LedgerUnavailable) for item in failed)
            outages.on_error(RedisErrorKind.CONNECTION)
            with run_valkey(port=port):
                await asyncio.gather(*(reader.read(("GET", "x")) for _ in range(20)))
    await connections.aclose()
    assert [log["event"] for log in logs] == ["redis.unavailable", "redis.available"] * 2
    assert [log.get("failed_calls") for log in logs] == [None, 20, None, 20]
    assert len(counted) == 42
    assert calls == ([RedisOutcome.UNAVAILABLE] * 20 + [RedisOutcome.OK] * 20) * 2


def test_outage_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Successful calls among failing ones do not end an outage; an error response starts one too."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    outages = OutageLogger(lambda *_: None, lambda _: None)
    with capture_logs() as logs:
        for _ in range(100):
            outages.on_error(RedisErrorKind.RESPONSE)
            outages.on_call("reserve", RedisOutcome.UNAVAILABLE, 0)
            outages.on_call("reserve", RedisOutcome.OK, 0)
            now += 0.5
        now += redis.QUIET_SECONDS
        outages.on_error(RedisErrorKind.RESPONSE)
        outages.on_call("reserve", RedisOutcome.ERROR, 0)
        outages.on_call("reserve", RedisOutcome.OK, 0)
        outages.on_error(RedisErrorKind.RESPONSE)
        outages.on_call("reserve", RedisOutcome.ERROR, 0)
    assert [log["event"] for log in logs] == ["redis.unavailable", "redis.available"]


async def _wait_for_failures(failures: asyncio.Queue[RedisErrorKind]) -> None:
    while not failures.empty():
        failures.get_nowait()
    for _ in range(_FAILURES):
        await failures.get()


async def _wait_for_message(connections: Connections, follower: Subscriber, logs: Sequence[Mapping[str, Any]]) -> None:
    """Wait until it receives again: shown by the loaded registry, or by a log line about an invalid message."""
    while not (isinstance(follower, CachedRegistry) and follower.is_ready):
        await connections.commands.publish(KEYS.task_events_channel, b"nonsense")
        if any(log["event"] == "pubsub.invalid_message" for log in logs):
            return
        await asyncio.sleep(0.01)
