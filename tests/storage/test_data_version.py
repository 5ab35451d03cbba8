"""A gateway reads and writes only data of its own version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from service.domain.tenants import Account, Tenant
from service.storage.connections import connect
from service.storage.ledger import RedisLedger
from service.storage.redis import (
    DATA_VERSION,
    UPGRADABLE_VERSION,
    DataVersionError,
    DataVersionGuard,
    Keys,
    RedisScripts,
)
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
        self.guard = DataVersionGuard(KEYS, self.errors.append, version=version, upgrade=self._upgrade)
        self.bind: Callable[[Account], Account | None] = lambda _: None
        self.client = client
        scripts = RedisScripts(client, version_guard=self.guard)
        self.registry = RedisRegistry(scripts, KEYS)
        self.ledger = RedisLedger(scripts, KEYS, RETENTION)

    async def _upgrade(self) -> None:
        former = RedisScripts(
            self.client, version_guard=DataVersionGuard(KEYS, lambda _: None, version=UPGRADABLE_VERSION)
        )
        await RedisRegistry(former, KEYS).upgrade(self.bind)


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


async def test_upgrade(topology: RunningStore) -> None:
    """Of several processes one converts the data of the former version, and what was changed meanwhile too."""

    def store_account(name: str) -> None:
        topology.execute("HSET", KEYS.registry, f"account:{name}", msgspec.msgpack.encode(Account(7, name, b"key")))
        topology.execute("HINCRBY", KEYS.registry, "version", "1")

    def bind(account: Account) -> Account:
        bound.append(account.name)
        if len(bound) == 1:
            store_account("late")
        return replace(account, user_key=account.user_key + b" bound")

    bound: list[str] = []
    topology.execute("SET", KEYS.data_version, str(UPGRADABLE_VERSION))
    store_account("main")
    async with AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(open_gateway(topology)) for _ in range(3)]
        for gateway in gateways:
            gateway.bind = bind
        loaded = await asyncio.gather(*(gateway.registry.load() for gateway in gateways))
    assert topology.execute("GET", KEYS.data_version) == MARK
    for registry in loaded:
        keys = {account.name: account.user_key for account in registry.accounts.values()}
        assert (registry.version, keys) == (3, {"main": b"key bound", "late": b"key bound"})
    assert [gateway.errors for gateway in gateways] == [[], [], []]


async def test_refused_upgrade(topology: RunningStore) -> None:
    """Data of the former version with a key that can't be decrypted stays as it is, and the process ends."""
    account = msgspec.msgpack.encode(Account(7, "main", b"key"))
    topology.execute("HSET", KEYS.registry, "version", "1", "account:main", account)
    topology.execute("SET", KEYS.data_version, str(UPGRADABLE_VERSION))
    before = read_all_keys(topology)
    async with open_gateway(topology) as gateway:
        for _ in range(2):
            with pytest.raises(DataVersionError):
                await gateway.registry.load()
    (error,) = gateway.errors
    assert "accounts.main.user_key" in error.reason
    assert read_all_keys(topology) == before
