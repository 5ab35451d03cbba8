"""A gateway reads and writes only data of its own version."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
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
from tests.support.retention import make_retention
from tests.support.stores import RunningStore, run_cluster, run_single

KEYS = Keys("versioned")
MARK = str(DATA_VERSION)
CHANGE = RegistryChange(version=0, next_id=2, tenants=(Tenant(1, "shop", ()),))


@pytest.fixture(scope="module", params=[run_single, run_cluster], ids=lambda made: made.__name__)
def server(request: pytest.FixtureRequest) -> Iterator[RunningStore]:
    """Yield a single server and one in a Cluster."""
    with request.param() as running:
        yield running


@pytest.fixture
def store(server: RunningStore) -> RunningStore:
    server.execute("FLUSHALL")
    return server


class Gateway:
    """The connections of one gateway to a store; `errors` are those that would end it."""

    def __init__(self, store: RunningStore, version: int = DATA_VERSION) -> None:
        self.errors: list[DataVersionError] = []
        self.connections = connect(store.url, timeout=5)
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


def read_all_keys(store: RunningStore) -> dict[bytes, Any]:
    return {key: store.execute("DUMP", key) for key in store.execute("KEYS", "*")}


async def test_empty_store(store: RunningStore) -> None:
    """The first read marks an empty store, and the mark stays."""
    async with Gateway(store) as gateway:
        assert (await gateway.registry.load()).version == 0
    assert read_all_keys(store).keys() == {KEYS.data_version.encode()}
    assert store.execute("GET", KEYS.data_version) == MARK.encode()
    assert store.execute("TTL", KEYS.data_version) == -1


async def test_unmarked_data(store: RunningStore) -> None:
    """Data without a mark, as version 0.2.0 wrote it, is of data version 1: it is neither read nor marked."""
    async with Gateway(store) as gateway:
        await RedisRegistry(RedisScripts(gateway.connections.commands), KEYS).write(CHANGE)
        before = read_all_keys(store)
        with pytest.raises(DataVersionError):
            await gateway.registry.load()
    async with Gateway(store) as gateway:
        gateway.scripts._version_guard.is_checked = True  # type: ignore[union-attr] # as if it had been right before
        with pytest.raises(DataVersionError):
            await gateway.ledger.reopen_account(1)
    assert read_all_keys(store) == before
    assert "has version 1," in gateway.errors[0].reason


@pytest.mark.parametrize("version", ["0", "1", str(DATA_VERSION + 1), "11", "", "x" * 100, "\xff"])
async def test_other_version(store: RunningStore, version: str) -> None:
    """Data of another version is neither read nor written, and the error names both versions."""
    store.execute("SET", KEYS.data_version, version)
    before = read_all_keys(store)
    async with Gateway(store) as gateway:
        for call in (
            gateway.registry.load,
            lambda: gateway.registry.write(CHANGE),
            lambda: gateway.ledger.settle_expired(1),
        ):
            with pytest.raises(DataVersionError):
                await call()
    assert read_all_keys(store) == before
    (error,) = gateway.errors
    assert f"version {MARK}:" in error.reason
    assert len(error.reason.splitlines()) == 1
    if version.isdigit():
        assert f"version {version}," in error.reason


async def test_two_versions_at_once(store: RunningStore) -> None:
    """Of gateways of two versions that start on an empty store at once, those of one version continue."""
    async with AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(Gateway(store, version)) for version in [1, 2] * 5]
        await asyncio.gather(*(gateway.registry.load() for gateway in gateways), return_exceptions=True)
    marked = int(store.execute("GET", KEYS.data_version))
    assert [not gateway.errors for gateway in gateways] == [version == marked for version in [1, 2] * 5]


async def test_replaced_while_it_runs(store: RunningStore) -> None:
    """No script writes to data of another version that replaced its own, and the registry is not restored."""
    async with Gateway(store) as gateway:
        live = CachedRegistry(gateway.registry)
        await gateway.registry.write(CHANGE)
        await live.refresh()
        store.execute("FLUSHALL")
        store.execute("SET", KEYS.data_version, str(DATA_VERSION + 1))
        before = read_all_keys(store)
        with pytest.raises(DataVersionError):
            await gateway.ledger.reopen_account(1)
        with pytest.raises(DataVersionError):
            await live.refresh()
    assert read_all_keys(store) == before
    assert len(gateway.errors) == 1


@pytest.mark.parametrize("job", ["refresh", "expire"])
async def test_replaced_while_idle(store: RunningStore, job: str) -> None:
    """An idle gateway detects the replacement through its periodic jobs."""
    async with Gateway(store) as gateway:
        live = CachedRegistry(gateway.registry)
        await gateway.registry.write(CHANGE)
        await live.refresh()
        store.execute("FLUSHALL")
        store.execute("SET", KEYS.data_version, str(DATA_VERSION + 1))
        store.execute("ZADD", KEYS.leases, "1", "r")
        store.execute("HSET", KEYS.registry, "version", "1")
        before = read_all_keys(store)
        with pytest.raises(DataVersionError):
            await (live.refresh() if job == "refresh" else gateway.ledger.settle_expired(1))
    assert read_all_keys(store) == before
    assert len(gateway.errors) == 1


async def test_emptied_while_it_runs(store: RunningStore) -> None:
    """The first script that writes to an emptied store marks it again."""
    async with Gateway(store) as gateway:
        await gateway.registry.load()
        store.execute("FLUSHALL")
        await gateway.ledger.reopen_account(1)
        assert store.execute("GET", KEYS.data_version) == MARK.encode()
        store.execute("FLUSHALL")
        assert await gateway.registry.read_version() == 0
        await gateway.registry.load()
        assert store.execute("GET", KEYS.data_version) == MARK.encode()
    assert gateway.errors == []


async def test_store_that_refuses_writes(store: RunningStore) -> None:
    """Data that cannot be marked now is read, and marked later."""
    store.execute("CONFIG", "SET", "min-replicas-to-write", "1")
    async with Gateway(store) as gateway:
        try:
            assert (await gateway.registry.load()).version == 0
            assert store.execute("EXISTS", KEYS.data_version) == 0
        finally:
            store.execute("CONFIG", "SET", "min-replicas-to-write", "0")
        await gateway.registry.load()
        assert store.execute("GET", KEYS.data_version) == MARK.encode()


async def test_check_costs_no_command(store: RunningStore) -> None:
    """After the check a call sends no further command; scripts read the mark themselves."""

    async def commands(ledger: RedisLedger) -> dict[str, int]:
        await ledger.reopen_account(1)
        store.execute("CONFIG", "RESETSTAT")
        await ledger.account_states([1])
        await ledger.reopen_account(1)
        statistics = store.execute("INFO", "commandstats")
        return {name: statistics[f"cmdstat_{name}"]["calls"] for name in ("evalsha", "get", "hget")}

    async with Gateway(store) as gateway:
        unguarded = await commands(RedisLedger(RedisScripts(gateway.connections.commands), KEYS, make_retention()))
        guarded = await commands(gateway.ledger)
    assert guarded == unguarded | {"get": unguarded["get"] + 1}
