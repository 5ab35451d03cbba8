"""What is followed is tried again for as long as Redis is away, and an outage is logged once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import pytest
from structlog.testing import capture_logs

from service.domain.errors import LedgerUnavailable
from service.storage import redis, registry, tasks
from service.storage.connections import Connections, connect
from service.storage.redis import Fault, Outages, Scripts
from service.storage.registry import LiveRegistry, RedisRegistry
from service.storage.tasks import Changes
from service.telemetry.metrics import LedgerOutcome, StoreError
from service.usecases.task_cache import Board, Pace
from tests.storage.shop import KEYS
from tests.support.valkey import free_port, running

PATIENCE = 20.0
_ROUNDS = 5


class Follower(Protocol):
    """What follows announcements for ever."""

    async def follow(self) -> None: ...


Make = Callable[[Connections, Fault], Follower]


def _changes(connections: Connections, failed: Fault) -> Follower:
    return Changes(connections.subscriber, KEYS.changes_channel, Board(Pace(2.5)), failed=failed)


def _registry(connections: Connections, failed: Fault) -> Follower:
    store = RedisRegistry(Scripts(connections.commands), KEYS)
    return LiveRegistry(store, connections.subscriber, KEYS.registry_channel, failed=failed)


@pytest.mark.parametrize("make", [_changes, _registry])
async def test_an_outage_is_followed_through(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is tried while the store is away, it is heard again when it is back, and logs nothing itself."""
    for module in (tasks, registry):
        monkeypatch.setattr(module, "AWAY_SECONDS", 0.01)
    port, failures = free_port(), asyncio.Queue[StoreError]()
    connections = connect(f"redis://127.0.0.1:{port}", timeout=5)
    with capture_logs() as logs:
        follower = make(connections, failures.put_nowait)
        following = asyncio.create_task(follower.follow())
        try:
            async with asyncio.timeout(PATIENCE):
                await _several(failures)
                assert logs == []
                with running(port=port):
                    await _heard(connections, follower, logs)
                await _several(failures)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await connections.aclose()


async def test_an_outage_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line when it begins and one when it ends, however much fails in between, of calls and of subscriptions."""
    monkeypatch.setattr(redis, "QUIET_SECONDS", 0)
    port, counted, calls = free_port(), list[StoreError](), list[LedgerOutcome]()
    connections = connect(f"redis://127.0.0.1:{port}", timeout=5)
    outages = Outages(lambda _, outcome, __: calls.append(outcome), counted.append)
    reader = Scripts(connections.commands, observe=outages.observe, failed=outages.failed)
    with capture_logs() as logs:
        for _ in range(2):
            failed = await asyncio.gather(*(reader.read(("GET", "x")) for _ in range(20)), return_exceptions=True)
            assert all(isinstance(each, LedgerUnavailable) for each in failed)
            outages.failed(StoreError.CONNECTION)
            with running(port=port):
                await asyncio.gather(*(reader.read(("GET", "x")) for _ in range(20)))
    await connections.aclose()
    assert [each["event"] for each in logs] == ["redis.unavailable", "redis.available"] * 2
    assert [each.get("failed_calls") for each in logs] == [None, 20, None, 20]
    assert len(counted) == 42
    assert calls == ([LedgerOutcome.UNAVAILABLE] * 20 + [LedgerOutcome.OK] * 20) * 2


def test_an_outage_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that are answered among others that fail do not end an outage; a refusal by Redis begins one too."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    outages = Outages(lambda *_: None, lambda _: None)
    with capture_logs() as logs:
        for _ in range(100):
            outages.failed(StoreError.RESPONSE)
            outages.observe("reserve", LedgerOutcome.UNAVAILABLE, 0)
            outages.observe("reserve", LedgerOutcome.OK, 0)
            now += 0.5
        now += redis.QUIET_SECONDS
        outages.failed(StoreError.RESPONSE)
        outages.observe("reserve", LedgerOutcome.FAULT, 0)
        outages.observe("reserve", LedgerOutcome.OK, 0)
        outages.failed(StoreError.RESPONSE)
        outages.observe("reserve", LedgerOutcome.FAULT, 0)
    assert [each["event"] for each in logs] == ["redis.unavailable", "redis.available"]


async def _several(failures: asyncio.Queue[StoreError]) -> None:
    """Wait until it has failed several times from now on."""
    while not failures.empty():
        failures.get_nowait()
    for _ in range(_ROUNDS):
        await failures.get()


async def _heard(connections: Connections, follower: Follower, logs: Sequence[Mapping[str, Any]]) -> None:
    """Wait until it hears again, which it shows by the registry it took, or by what it says of nonsense."""
    while not (isinstance(follower, LiveRegistry) and follower.ready):
        await connections.commands.publish(KEYS.changes_channel, b"nonsense")
        if any(each["event"] == "change.garbled" for each in logs):
            return
        await asyncio.sleep(0.01)
