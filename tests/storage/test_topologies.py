"""The ledger, the tasks and the registry work alike on one server, behind Sentinel and on a Cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from service.domain.ledger import Figures, Granted, NoAccount, PolicyDenied, ReservationState
from service.domain.tasks import Artifact, ArtifactName, Kind, State
from service.domain.tenants import Account, Limit, Tenant, TenantPolicy, Token, Window
from service.storage.connections import connect
from service.storage.ledger import RedisLedger, Spans
from service.storage.redis import Keys, Scripts
from service.storage.registry import LiveRegistry, RedisRegistry
from service.storage.tasks import RedisTasks
from service.usecases.ports import Answered, Ask, Check, RegistryChange, Settlement, TaskDraft
from tests.support.stores import Store, cluster, single, unix, watched

KEYS = Keys("gw")
SPANS = Spans(check_after=0)
TENANT = Tenant(1, "shop", ("main",), TenantPolicy(limits=(Limit(Window.DAY, tasks=2),)))
ACCOUNT = Account(2, "main", b"sealed")


@pytest.fixture(scope="module", params=[single, unix, watched, cluster], ids=lambda made: made.__name__)
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """A store of each kind."""
    with request.param() as made:
        yield made


async def test_a_submission_from_reserve_to_receipt(store: Store) -> None:
    """Every script and every read does its work on every kind of store."""
    store.ask("FLUSHALL")
    connections = connect(store.url, timeout=5)
    scripts = Scripts(connections.commands)
    ledger = RedisLedger(scripts, KEYS, SPANS)
    tasks = RedisTasks(scripts, KEYS, SPANS)
    registry = RedisRegistry(scripts, KEYS)
    assert await registry.write(RegistryChange(version=0, next_id=3, tenants=(TENANT,), accounts=(ACCOUNT,)))
    assert not await registry.write(RegistryChange(version=0, next_id=3))

    first, _ = await ledger.reserve(Ask("r1", 1, (2,), Kind.SEAMLESS))
    second, snapshot = await ledger.reserve(Ask("r2", 1, (2,), Kind.SEAMLESS))
    third, _ = await ledger.reserve(Ask("r3", 1, (2,), Kind.SEAMLESS))
    assert isinstance(first, Granted)
    assert isinstance(second, Granted)
    assert isinstance(third, PolicyDenied)
    assert snapshot.state.active == 2
    assert isinstance(await ledger.retarget(Ask("r2", 1, (), Kind.SEAMLESS), 2, None), NoAccount)

    draft = TaskDraft("task_1", msgspec.Raw(b'{"fit":0.5}'), msgspec.Raw(b"{}"))
    accepted = Settlement(
        reservation="r1",
        tenant=1,
        account=2,
        kind=Kind.SEAMLESS,
        created=first.now,
        outcome=ReservationState.ACCEPTED,
        figures=Figures(9, 100),
        draft=draft,
    )
    assert await ledger.settle(accepted)
    assert not await ledger.settle(accepted)

    (due,) = await tasks.claim(5)
    ended = await tasks.record(
        due,
        Check(
            answered=Answered.SUCCEEDED,
            artifacts=(Artifact(ArtifactName.GRID, "http://up.test/grid.png"),),
            figures=Figures(9, 100),
        ),
    )
    assert ended is not None
    found = await tasks.get("r1")
    assert found is not None
    assert found[0].artifacts == ended[0].artifacts
    page = await tasks.page(1, state=State.SUCCEEDED, kind=None, limit=5, cursor=None)
    assert [task.id for task in page.tasks] == ["task_1"]
    assert page.cursor is None

    await connections.commands.set(KEYS.clock, second.lease)
    assert len(await ledger.expire(5)) == 1
    assert (await ledger.counters(1)).state.windows[Window.TOTAL].tasks == 2
    assert (await ledger.accounts([2]))[2].unknown == 1
    await ledger.reopen(2)
    assert (await ledger.accounts([2]))[2].count is None
    await connections.aclose()


async def test_a_lease_without_its_reservation(store: Store) -> None:
    """A lease whose reservation is gone is dropped, and does not hold up the others."""
    store.ask("FLUSHALL")
    connections = connect(store.url, timeout=5)
    client: Any = connections.commands
    scripts = Scripts(client)
    ledger = RedisLedger(scripts, KEYS, SPANS)
    await RedisRegistry(scripts, KEYS).write(
        RegistryChange(version=0, next_id=3, tenants=(TENANT,), accounts=(ACCOUNT,))
    )
    granted, _ = await ledger.reserve(Ask("r1", 1, (2,), Kind.SEAMLESS))
    assert isinstance(granted, Granted)
    await client.zadd(KEYS.leases, {"gone": 1})
    await client.set(KEYS.clock, granted.lease)
    assert len(await ledger.expire(5)) == 1
    assert await client.zcard(KEYS.leases) == 0
    await connections.aclose()


async def test_a_change_of_the_registry_is_heard(store: Store) -> None:
    """What one process changes, another knows without being asked to look."""
    store.ask("FLUSHALL")
    connections = connect(store.url, timeout=5)
    registry = RedisRegistry(Scripts(connections.commands), KEYS)
    live = LiveRegistry(registry, connections.subscriber, KEYS.registry_channel)
    following = asyncio.create_task(live.follow())
    async with asyncio.timeout(4):  # less than the interval at which it looks by itself
        while not live.ready:
            await asyncio.sleep(0)
        token = Token("t1", 1, b"digest", None, created=0)
        await registry.write(RegistryChange(version=0, next_id=3, tenants=(TENANT,), tokens=(token,)))
        while live.current.version == 0:
            await asyncio.sleep(0)
    assert live.current.tenant_by_token(b"digest") == (TENANT, token)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await connections.aclose()
