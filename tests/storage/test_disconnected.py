"""Who follows what others announce tries again for as long as the store is away, and says so once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import pytest
from structlog.testing import capture_logs

from service.storage import changes, registry
from service.storage.changes import Changes
from service.storage.connect import Connections, connect
from service.storage.registry import LiveRegistry, RedisRegistry
from service.storage.scripts import Fault, Scripts
from service.telemetry.families import StoreError
from service.usecases.board import Board
from service.usecases.pace import Pace
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


@pytest.mark.parametrize(("make", "event"), [(_changes, "changes.disconnected"), (_registry, "registry.disconnected")])
async def test_an_outage_is_logged_once(make: Make, event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is tried while the store is away, that is told once, and again when it goes away anew."""
    for module in (changes, registry):
        monkeypatch.setattr(module, "AWAY_SECONDS", 0.01)
    port, failures = free_port(), asyncio.Queue[StoreError]()
    connections = connect(f"redis://127.0.0.1:{port}", timeout=5)
    with capture_logs() as logs:
        follower = make(connections, failures.put_nowait)
        following = asyncio.create_task(follower.follow())
        try:
            async with asyncio.timeout(PATIENCE):
                await _several(failures)
                with running(port=port):
                    await _heard(connections, follower, logs)
                await _several(failures)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await connections.aclose()
    assert [each["event"] for each in logs if each["event"] == event] == [event] * 2


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
