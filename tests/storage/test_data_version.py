"""A gateway reads and writes only data of its own version."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, Self

import pytest

from service.domain.tenants import Tenant
from service.storage.connections import connect
from service.storage.ledger import RedisLedger
from service.storage.redis import DATA_VERSION, DataVersionError, DataVersionGuard, Keys, RedisScripts
from service.storage.registry import RedisRegistry
from service.usecases.caches import CachedRegistry
from service.usecases.ports import RegistryChange
from tests.support.tasks import make_retention
from tests.support.valkey import RunningStore

KEYS = Keys("versioned")
MARK = str(DATA_VERSION)
CHANGE = RegistryChange(version=0, next_id=2, tenants=(Tenant(1, "shop", ()),))


class Gateway:
    """The connections of one gateway to a store; `errors` are those that would end it."""

    def __init__(self, topology: RunningStore, version: int = DATA_VERSION) -> None:
        self.errors: list[DataVersionError] = []
        self.connections = connect(topology.url, timeout=5)
        self.scripts = RedisScripts(
            self.connections.commands,
            version_guard=DataVersionGuard(KEYS, self.errors.append, version=version),
        )
        self.registry = RedisRegistry(self.scripts, KEYS)
        self.ledger = RedisLedger(self.scripts, KEYS, make_retention())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.connections.aclose()


def read_all_keys(topology: RunningStore) -> dict[bytes, Any]:
    return {key: topology.execute("DUMP", key) for key in topology.execute("KEYS", "*")}


async def test_unmarked_data(topology: RunningStore) -> None:
    """Data without a mark, as version 0.2.0 wrote it, is of data version 1: it is neither read nor marked."""
    async with Gateway(topology) as gateway:
        await RedisRegistry(RedisScripts(gateway.connections.commands), KEYS).write(CHANGE)
        before = read_all_keys(topology)
        with pytest.raises(DataVersionError):
            await gateway.registry.load()
    async with Gateway(topology) as gateway:
        gateway.scripts._version_guard.is_checked = True  # type: ignore[union-attr] # as if it had been right before
        with pytest.raises(DataVersionError):
            await gateway.ledger.reopen_account(1)
    assert read_all_keys(topology) == before
    assert len(gateway.errors) == 1


@pytest.mark.parametrize("version", ["1", str(DATA_VERSION + 1), "", "x" * 100, "\xff"])
async def test_other_version(topology: RunningStore, version: str) -> None:
    """Data of another version is neither read nor written, with one line of error."""
    topology.execute("SET", KEYS.data_version, version)
    before = read_all_keys(topology)
    async with Gateway(topology) as gateway:
        for call in (
            gateway.registry.load,
            lambda: gateway.registry.write(CHANGE),
            lambda: gateway.ledger.settle_expired(1),
        ):
            with pytest.raises(DataVersionError):
                await call()
    assert read_all_keys(topology) == before
    (error,) = gateway.errors
    assert len(error.reason.splitlines()) == 1


async def test_two_versions_at_once(topology: RunningStore) -> None:
    """Of gateways of two versions that start on an empty store at once, those of one version continue."""
    async with AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(Gateway(topology, version)) for version in [1, 2] * 5]
        await asyncio.gather(*(gateway.registry.load() for gateway in gateways), return_exceptions=True)
    marked = int(topology.execute("GET", KEYS.data_version))
    assert [not gateway.errors for gateway in gateways] == [version == marked for version in [1, 2] * 5]


@pytest.mark.parametrize("job", ["refresh", "expire", "reopen"])
async def test_replaced(topology: RunningStore, job: str) -> None:
    """A running gateway writes nothing to data of another version that replaced its own, and ends."""
    async with Gateway(topology) as gateway:
        live = CachedRegistry(gateway.registry)
        await gateway.registry.write(CHANGE)
        await live.refresh()
        topology.execute("FLUSHALL")
        topology.execute("SET", KEYS.data_version, str(DATA_VERSION + 1))
        topology.execute("ZADD", KEYS.leases, "1", "r")
        topology.execute("HSET", KEYS.registry, "version", "1")
        before = read_all_keys(topology)
        jobs: dict[str, Callable[[], Awaitable[object]]] = {
            "refresh": live.refresh,
            "expire": lambda: gateway.ledger.settle_expired(1),
            "reopen": lambda: gateway.ledger.reopen_account(1),
        }
        with pytest.raises(DataVersionError):
            await jobs[job]()
        with pytest.raises(DataVersionError):
            await live.refresh()
    assert read_all_keys(topology) == before
    assert len(gateway.errors) == 1


async def test_empty_store(topology: RunningStore) -> None:
    """The first read marks an empty store, and so does the first script that writes to an emptied one."""
    async with Gateway(topology) as gateway:
        assert (await gateway.registry.load()).version == 0
        assert read_all_keys(topology).keys() == {KEYS.data_version.encode()}
        assert topology.execute("TTL", KEYS.data_version) == -1
        topology.execute("FLUSHALL")
        await gateway.ledger.reopen_account(1)
        assert topology.execute("GET", KEYS.data_version) == MARK.encode()
        topology.execute("FLUSHALL")
        assert await gateway.registry.read_version() == 0
        await gateway.registry.load()
        assert topology.execute("GET", KEYS.data_version) == MARK.encode()
    assert gateway.errors == []


async def test_store_that_refuses_writes(topology: RunningStore) -> None:
    """Data that cannot be marked now is read, and marked later."""
    topology.execute("CONFIG", "SET", "min-replicas-to-write", "1")
    async with Gateway(topology) as gateway:
        try:
            assert (await gateway.registry.load()).version == 0
            assert topology.execute("EXISTS", KEYS.data_version) == 0
        finally:
            topology.execute("CONFIG", "SET", "min-replicas-to-write", "0")
        await gateway.registry.load()
        assert topology.execute("GET", KEYS.data_version) == MARK.encode()
