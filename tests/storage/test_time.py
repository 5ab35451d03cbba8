"""The times of the scripts: the ledger's, which never steps back, and windows that begin and end with the calendar."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from service.domain import ledger
from service.domain.ledger import Figures, PolicyDenied, ReservationState, Violation
from service.domain.tasks import Kind
from service.domain.tenants import Limit, Tenant, TenantPolicy, Window
from service.domain.webhooks import DeliveryState
from service.storage.connections import connect
from service.storage.deliveries import RedisAgenda
from service.storage.ledger import RedisLedger, Spans
from service.storage.redis import Keys, Scripts, server_time
from service.storage.registry import RedisRegistry
from service.usecases.ports import Answered, Ask, Check, Outcome, RegistryChange, Snapshot
from tests.storage.store import FIRST, SECOND, SPANS, TENANT, TENANTS, Store
from tests.support.server_time import install, set_time
from tests.support.valkey import Valkey

KEYS = Keys("time")
CLOSED = TenantPolicy(tuple(Limit(window, tasks=0) for window in Window))
"""Limits that refuse everything, and tell when each window ends."""

STEP = 20 * 60_000
ENDED = Check(answered=Answered.SUCCEEDED, figures=Figures(8, 0))


def at(moment: str) -> int:
    """A moment of UTC in milliseconds."""
    return int(datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()) * 1000


async def refuse(url: str, *times: int) -> tuple[PolicyDenied, Snapshot, list[int]]:
    """What a refusal tells at the last of these times of the server, and its own times before and after it."""
    install()
    connections = connect(url, timeout=5)
    client: Any = connections.commands
    scripts = Scripts(client)
    await client.flushall()
    registry = RedisRegistry(scripts, KEYS)
    assert await registry.write(RegistryChange(version=0, next_id=2, tenants=(Tenant(1, "t", (), CLOSED),)))
    began = await client.time()
    verdict, snapshot = None, None
    for now in times or (None,):
        if now is not None:
            await set_time(client, KEYS, now)
        verdict, snapshot = await RedisLedger(scripts, KEYS, Spans()).reserve(Ask("r", 1, (), Kind.UPSCALE))
    ended = await client.time()
    await connections.aclose()
    assert isinstance(verdict, PolicyDenied)
    assert snapshot
    return verdict, snapshot, [server_time(each) for each in (began, ended)]


@settings(max_examples=50, deadline=None)
@given(now=st.integers(at("2050-01-01"), at("2450-01-01")))
@example(now=at("2052-02-29"))
@example(now=at("2052-03-01") - 1)
@example(now=at("2099-12-31T23:59:59"))
@example(now=at("2100-02-28T12:00"))
@example(now=at("2100-03-01"))
@example(now=at("2400-02-29T23:59"))
def test_calendar(valkey: Valkey, now: int) -> None:
    """Windows begin and end in Redis as in the domain, in every century, month and leap year."""
    verdict, snapshot, _ = asyncio.run(refuse(valkey.url, now))
    assert verdict.violations == tuple(
        Violation(ledger.policy_name(each, ledger.COUNTED_TASKS), 0, ledger.period_of(each, now)[1]) for each in Window
    )
    assert {window: each.period for window, each in snapshot.state.windows.items()} == {
        each: ledger.period_of(each, now)[0] for each in Window
    }


async def test_clock(valkey: Valkey) -> None:
    """Verdicts tell the server's time, to the millisecond."""
    verdict, _, (began, ended) = await refuse(valkey.url)
    assert began <= verdict.now <= ended


async def test_windows_after_a_step_back(valkey: Valkey) -> None:
    """After the server's clock has stepped back, windows are those of its new time."""
    stepped = at("2050-01-01") - STEP
    verdict, snapshot, _ = await refuse(valkey.url, at("2050-01-01"), stepped)
    assert verdict.now == stepped
    resets = {each.policy: each.resets_at for each in verdict.violations}
    assert resets["day-tasks"] == at("2050-01-01")
    assert snapshot.state.windows[Window.MINUTE].period == stepped


async def test_limits_after_a_step_back(store: Store) -> None:
    """What was used of a day still counts when the server's clock has stepped back into it, and so does the next."""
    await store.wait(-1_000)
    await store.change(1, tenants=(replace(TENANTS[0], policy=TenantPolicy((Limit(Window.DAY, tasks=1),))),))
    ask = Ask("more", TENANT, (FIRST,), Kind.UPSCALE)
    await store.accept("before midnight")
    for name, step in (("after midnight", 2_000), (None, -2_000), (None, 2_000)):
        await store.wait(step)
        if name:
            await store.accept(name)
        verdict, _ = await store.ledger.reserve(ask)
        assert isinstance(verdict, PolicyDenied)


async def test_settled_after_its_day_and_before_a_step_back(store: Store) -> None:
    """A place that was settled when its day was over is not held any more when the clock steps back into that."""
    await store.wait(-1_000)
    await store.reserve("r")
    await store.wait(2_000)
    await store.settle("r", ReservationState.REFUSED)
    await store.wait(-2_000)
    await store.reserve("again")
    counter = (await store.ledger.counters(TENANT)).state.windows[Window.DAY]
    assert (counter.tasks, counter.tasks_reserved) == (0, 1)


async def test_work_goes_on_after_a_step_back(store: Store) -> None:
    """Checks, leases, retries and windows go on after the server's clock has stepped back by 20 minutes."""
    agenda = RedisAgenda(store.scripts, store.keys)
    await store.accept("told", webhook="http://shop.test/")
    await store.check(ENDED)
    await store.accept("runs")
    await store.reserve("dies")
    (claimed,) = await agenda.claim(1)
    assert await agenda.record(claimed, Outcome(state=DeliveryState.PENDING, wait=30_000))
    await store.wait(-STEP)
    assert await agenda.claim(1) == []
    await store.wait(40_000)  # of which the ledger's time makes nine tenths
    (again,) = await agenda.claim(1)
    assert again.delivery.due == store.now - 40_000 + STEP + 30_000
    assert [each.task.reservation for each in await store.tasks.claim(9)] == ["runs"]
    await store.wait(SPANS.lease)
    assert [each.reservation for each in await store.ledger.expire(9)] == ["dies"]
    before = (await store.ledger.counters(TENANT)).state.windows[Window.TOTAL].tasks
    await store.accept("later")
    found = await store.tasks.get("later")
    assert found
    assert found[0].created == found[1] == store.now
    snapshot = await store.ledger.counters(TENANT)
    assert snapshot.state.windows[Window.MINUTE].period == ledger.period_of(Window.MINUTE, store.now)[0]
    assert snapshot.state.windows[Window.TOTAL].tasks == before + 1


async def test_offset_shrinks(store: Store) -> None:
    """The offset is what the clock stepped back by, less a tenth of what has passed since, and then nothing."""
    await store.reserve("r")
    await store.wait(-STEP)
    await store.tasks.claim(1)
    assert await store.ledger.clock_offset() == STEP
    await store.wait(60_000)
    assert await store.ledger.clock_offset() == STEP - 6_000
    await store.wait(10 * STEP)
    await store.tasks.claim(1)
    assert await store.ledger.clock_offset() == 0
    assert await store.client.exists(store.keys.clock_offset) == 0


async def test_store_of_an_earlier_version(store: Store) -> None:
    """A store that keeps but the last time, ahead of the server's, is one whose clock has stepped back."""
    await store.client.set(store.keys.clock, store.now + STEP)
    await store.tasks.claim(1)
    assert await store.ledger.clock_offset() == STEP


async def test_reset(store: Store) -> None:
    """A reset moves what is due with the ledger's time: nothing is due earlier or later by the server's clock."""
    await store.accept("runs")
    await store.reserve("dies")
    await store.reserve("unknown")
    await store.settle("unknown", ReservationState.UNKNOWN)
    await store.wait(-STEP)
    await store.tasks.claim(0)
    due, lease = (
        await store.client.zscore(store.keys.watch, "runs"),
        await store.client.zscore(store.keys.leases, "dies"),
    )
    known = await store.books.submission("unknown")
    assert await store.ledger.reset_clock([TENANT], [FIRST, SECOND]) == STEP
    assert await store.ledger.clock_offset() == 0
    assert await store.client.zscore(store.keys.watch, "runs") == due - STEP
    assert await store.client.zscore(store.keys.leases, "dies") == lease - STEP
    assert await store.books.submission("unknown") == known
    assert await store.ledger.reset_clock([TENANT], [FIRST, SECOND]) == 0
