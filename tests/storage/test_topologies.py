"""Ledger, tasks and registry on a single server, behind Sentinel and on a Cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from service.domain.ledger import Balance, Grant, NoAccount, PolicyDenial, ReservationState
from service.domain.tasks import Artifact, ArtifactName, Kind, State
from service.domain.tenants import Account, Limit, Tenant, TenantPolicy, Token, Window
from service.storage.connections import connect
from service.storage.ledger import RedisLedger
from service.storage.redis import Keys, RedisScripts, Subscriber
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTaskStore
from service.usecases.caches import CachedRegistry
from service.usecases.ports import CheckOutcome, CheckResult, NewTask, RegistryChange, ReserveRequest, Settlement
from tests.support.retention import make_retention
from tests.support.stores import RunningStore, run_cluster, run_on_socket, run_single, run_with_sentinel

KEYS = Keys("gw")
RETENTION = make_retention(check_interval_ms=0)
TENANT = Tenant(1, "shop", ("main",), TenantPolicy(limits=(Limit(Window.DAY, tasks=2),)))
ACCOUNT = Account(2, "main", b"encrypted")


@pytest.fixture(
    scope="module", params=[run_single, run_on_socket, run_with_sentinel, run_cluster], ids=lambda made: made.__name__
)
def store(request: pytest.FixtureRequest) -> Iterator[RunningStore]:
    """Yield a store of each topology."""
    with request.param() as running:
        yield running


async def test_submission_from_reserve_to_cost(store: RunningStore) -> None:
    store.execute("FLUSHALL")
    connections = connect(store.url, timeout=5)
    scripts = RedisScripts(connections.commands)
    ledger = RedisLedger(scripts, KEYS, RETENTION)
    tasks = RedisTaskStore(scripts, KEYS, RETENTION)
    registry = RedisRegistry(scripts, KEYS)
    assert await registry.write(RegistryChange(version=0, next_id=3, tenants=(TENANT,), accounts=(ACCOUNT,)))
    assert not await registry.write(RegistryChange(version=0, next_id=3))

    first, _ = await ledger.reserve(ReserveRequest("r1", 1, (2,), Kind.SEAMLESS))
    second, snapshot = await ledger.reserve(ReserveRequest("r2", 1, (2,), Kind.SEAMLESS))
    third, _ = await ledger.reserve(ReserveRequest("r3", 1, (2,), Kind.SEAMLESS))
    assert isinstance(first, Grant)
    assert isinstance(second, Grant)
    assert isinstance(third, PolicyDenial)
    assert snapshot.state.active_tasks == 2
    assert isinstance(await ledger.change_account(ReserveRequest("r2", 1, (), Kind.SEAMLESS), 2, None), NoAccount)

    draft = NewTask("task_1", msgspec.Raw(b'{"fit":0.5}'), msgspec.Raw(b"{}"))
    accepted = Settlement(
        reservation="r1",
        tenant=1,
        account=2,
        kind=Kind.SEAMLESS,
        created_at=first.now,
        outcome=ReservationState.ACCEPTED,
        balance=Balance(9, 100),
        new_task=draft,
    )
    assert await ledger.settle(accepted)
    assert not await ledger.settle(accepted)

    (due,) = await tasks.claim_checks(5)
    ended = await tasks.record_check(
        due,
        CheckResult(
            outcome=CheckOutcome.SUCCEEDED,
            artifacts=(Artifact(ArtifactName.GRID, "http://up.test/grid.png"),),
            balance=Balance(9, 100),
        ),
    )
    assert ended is not None
    record = await tasks.get("r1")
    assert record is not None
    assert record[0].artifacts == ended[0].artifacts
    page = await tasks.list_page(1, state=State.SUCCEEDED, kind=None, limit=5, cursor=None)
    assert [task.id for task in page.tasks] == ["task_1"]
    assert page.next_cursor is None

    await connections.commands.set(KEYS.clock, second.lease_expires_at)
    assert len(await ledger.settle_expired(5)) == 1
    assert (await ledger.tenant_snapshot(1)).state.windows[Window.TOTAL].tasks == 2
    assert (await ledger.account_states([2]))[2].unknown_outcomes == 1
    await ledger.reopen_account(2)
    assert (await ledger.account_states([2]))[2].count is None
    await connections.aclose()


async def test_lease_without_reservation(store: RunningStore) -> None:
    """A lease without its reservation is dropped and delays no other."""
    store.execute("FLUSHALL")
    connections = connect(store.url, timeout=5)
    client: Any = connections.commands
    scripts = RedisScripts(client)
    ledger = RedisLedger(scripts, KEYS, RETENTION)
    await RedisRegistry(scripts, KEYS).write(
        RegistryChange(version=0, next_id=3, tenants=(TENANT,), accounts=(ACCOUNT,))
    )
    granted, _ = await ledger.reserve(ReserveRequest("r1", 1, (2,), Kind.SEAMLESS))
    assert isinstance(granted, Grant)
    await client.zadd(KEYS.leases, {"gone": 1})
    await client.set(KEYS.clock, granted.lease_expires_at)
    assert len(await ledger.settle_expired(5)) == 1
    assert await client.zcard(KEYS.leases) == 0
    await connections.aclose()


async def test_registry_change_is_received(store: RunningStore) -> None:
    store.execute("FLUSHALL")
    connections = connect(store.url, timeout=5)
    registry = RedisRegistry(RedisScripts(connections.commands), KEYS)
    live = CachedRegistry(registry)
    subscriber = Subscriber(connections.open_pubsub, KEYS.registry_channel, lambda _: live.refresh())
    following = asyncio.create_task(subscriber.run())
    async with asyncio.timeout(4):  # less than the interval at which it reloads anyway
        while not live.is_ready:
            await asyncio.sleep(0)
        token = Token("t1", 1, b"digest", None, created_at=0)
        await registry.write(RegistryChange(version=0, next_id=3, tenants=(TENANT,), tokens=(token,)))
        while live.current.version == 0:
            await asyncio.sleep(0)
    assert live.current.tenant_by_token(b"digest") == (TENANT, token)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await connections.aclose()
