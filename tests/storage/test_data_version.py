"""A gateway reads and writes only data of its own version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from service.domain.tenants import Tenant
from service.storage.connections import connect
from service.storage.ledger import RedisLedger
from service.storage.redis import DATA_VERSION, DataVersionError, DataVersionGuard, Keys, RedisScripts
from service.storage.registry import RedisRegistry
from service.usecases.ports import RegistryChange
from tests.storage.seeded_store import RETENTION
from tests.support.valkey import RunningStore

KEYS = Keys("versioned")
MARK = str(DATA_VERSION).encode()
CHANGE = RegistryChange(version=0, next_id=2, tenants=(Tenant(1, "shop", ()),))


class Gateway:
    """The ports of one gateway on a store; `errors` are those that would end it."""

    def __init__(self, client: Any, version: int) -> None:
        self.errors: list[DataVersionError] = []
        self.guard = DataVersionGuard(KEYS, self.errors.append, version=version)
        scripts = RedisScripts(client, version_guard=self.guard)
        self.registry = RedisRegistry(scripts, KEYS)
        self.ledger = RedisLedger(scripts, KEYS, RETENTION)


@asynccontextmanager
async def open_gateway(topology: RunningStore, version: int = DATA_VERSION) -> AsyncIterator[Gateway]:
    connections = connect(topology.url, timeout=5)
    try:
        yield Gateway(connections.commands, version)
    finally:
        await connections.aclose()


def read_all_keys(topology: RunningStore) -> dict[bytes, Any]:
    return {key: topology.execute("DUMP", key) for key in topology.execute("KEYS", "*")}


@pytest.mark.parametrize("version", [None, "1", str(DATA_VERSION + 1), "x" * 100])
async def test_other_version(topology: RunningStore, version: str | None) -> None:
    """Data of another version, or without a mark, is neither read nor written nor marked, with one line of error."""
    topology.execute("HSET", KEYS.registry, "version", "1")
    if version:
        topology.execute("SET", KEYS.data_version, version)
    before = read_all_keys(topology)
    async with open_gateway(topology) as gateway:
        for work in (gateway.registry.load(), gateway.registry.write(CHANGE), gateway.ledger.settle_expired(1)):
            with pytest.raises(DataVersionError):
                await work
    assert read_all_keys(topology) == before
    (error,) = gateway.errors
    assert len(error.reason.splitlines()) == 1


async def test_two_versions_at_once(topology: RunningStore) -> None:
    """Of gateways of two versions that start on an empty store at once, those of one version continue."""
    async with AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(open_gateway(topology, version)) for version in [1, 2] * 5]
        await asyncio.gather(*(gateway.registry.load() for gateway in gateways), return_exceptions=True)
    marked = int(topology.execute("GET", KEYS.data_version))
    assert [not gateway.errors for gateway in gateways] == [version == marked for version in [1, 2] * 5]


@pytest.mark.parametrize(
    "job",
    [
        lambda gateway: gateway.registry.read_version(),
        lambda gateway: gateway.ledger.settle_expired(1),
        lambda gateway: gateway.ledger.reopen_account(1),
    ],
    ids=["read", "expire", "reopen"],
)
async def test_replaced(topology: RunningStore, job: Callable[[Gateway], Awaitable[object]]) -> None:
    """A running gateway writes nothing to data of another version that replaced its own, and ends."""
    async with open_gateway(topology) as gateway:
        await gateway.registry.write(CHANGE)
        assert gateway.guard.is_checked
        topology.execute("FLUSHALL")
        topology.execute("SET", KEYS.data_version, str(DATA_VERSION + 1))
        topology.execute("ZADD", KEYS.leases, "1", "r")
        topology.execute("HSET", KEYS.registry, "version", "1")
        before = read_all_keys(topology)
        with pytest.raises(DataVersionError):
            await job(gateway)
    assert read_all_keys(topology) == before
    assert len(gateway.errors) == 1


async def test_empty_store(topology: RunningStore) -> None:
    """The first read marks an empty store, and so does the first script that writes to an emptied one."""
    async with open_gateway(topology) as gateway:
        assert (await gateway.registry.load()).version == 0
        assert read_all_keys(topology).keys() == {KEYS.data_version.encode()}
        assert topology.execute("TTL", KEYS.data_version) == -1
        topology.execute("FLUSHALL")
        await gateway.ledger.reopen_account(1)
        assert topology.execute("GET", KEYS.data_version) == MARK
        topology.execute("FLUSHALL")
        assert await gateway.registry.read_version() == 0
        await gateway.registry.load()
        assert topology.execute("GET", KEYS.data_version) == MARK
    assert gateway.errors == []


async def test_store_that_refuses_writes(topology: RunningStore) -> None:
    """Data that cannot be marked now, as without enough replicas, is read, and marked later."""
    async with open_gateway(topology) as gateway:
        topology.execute("CONFIG", "SET", "min-replicas-to-write", "1")
        try:
            assert (await gateway.registry.load()).version == 0
            assert topology.execute("EXISTS", KEYS.data_version) == 0
        finally:
            topology.execute("CONFIG", "SET", "min-replicas-to-write", "0")
        await gateway.registry.load()
        assert topology.execute("GET", KEYS.data_version) == MARK
