"""The time of the scripts: a clock that never steps back, and windows that begin and end as the calendar has it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.domain import windows
from service.domain.reservation import PolicyDenied, Violation
from service.domain.task import Kind
from service.domain.tenancy import Limit, Tenant, TenantPolicy, Window
from service.storage.connect import connect
from service.storage.keys import Keys
from service.storage.ledger import RedisLedger, Spans
from service.storage.registry import RedisRegistry
from service.storage.scripts import Scripts
from service.usecases.ports import Ask, RegistryChange, Snapshot
from tests.support.valkey import Valkey

KEYS = Keys("time")
CLOSED = TenantPolicy(tuple(Limit(window, tasks=0) for window in Window))
"""Limits that refuse everything, and tell when each window ends."""


def at(moment: str) -> int:
    """A moment of UTC in milliseconds."""
    return int(datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()) * 1000


async def refuse(url: str, *clock: int) -> tuple[PolicyDenied, Snapshot, list[int], int]:
    """What a refusal tells, the server's times before and after it, and the clock then, which may be set before."""
    connections = connect(url, timeout=5)
    client: Any = connections.commands
    scripts = Scripts(client)
    await client.flushall()
    registry = RedisRegistry(scripts, KEYS)
    assert await registry.write(RegistryChange(version=0, next_id=2, tenants=(Tenant(1, "t", (), CLOSED),)))
    for now in clock:
        await client.set(KEYS.clock, now)
    began = await client.time()
    verdict, snapshot = await RedisLedger(scripts, KEYS, Spans()).reserve(Ask("r", 1, (), Kind.UPSCALE))
    ended = await client.time()
    seen = int(await client.get(KEYS.clock))
    await connections.aclose()
    assert isinstance(verdict, PolicyDenied)
    return verdict, snapshot, [seconds * 1000 + micros // 1000 for seconds, micros in (began, ended)], seen


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
    verdict, snapshot, _, _ = asyncio.run(refuse(valkey.url, now))
    assert verdict.violations == tuple(
        Violation(windows.policy_name(each, windows.COUNTED_TASKS), 0, windows.period_of(each, now)[1])
        for each in Window
    )
    assert {window: each.period for window, each in snapshot.state.windows.items()} == {
        each: windows.period_of(each, now)[0] for each in Window
    }


@pytest.mark.parametrize("behind", [(), (1,)])
async def test_clock(valkey: Valkey, behind: tuple[int, ...]) -> None:
    """The clock is the server's, to the millisecond, and is remembered."""
    verdict, _, (began, ended), seen = await refuse(valkey.url, *behind)
    assert began <= verdict.now <= ended
    assert seen == verdict.now


async def test_clock_ahead(valkey: Valkey) -> None:
    """Where the clock has been ahead of the server's it stands, as after a failover to one that is behind."""
    ahead = at("2050-01-01")
    verdict, _, _, seen = await refuse(valkey.url, ahead)
    assert (verdict.now, seen) == (ahead, ahead)
