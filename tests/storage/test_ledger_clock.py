"""The ledger's clock, which never steps back, and calendar windows in the scripts."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from service.domain import ledger
from service.domain.errors import Violation
from service.domain.ledger import Grant, PolicyDenial, ReservationState
from service.domain.tasks import Kind
from service.domain.tenants import Limit, TenantPolicy, Window
from service.storage.redis import parse_server_time
from service.usecases.ports import ReserveRequest, TenantSnapshot
from tests.storage.seeded_store import FIRST, RETENTION, TENANT, TENANTS, SeededStore, open_seeded_store
from tests.support.valkey import Valkey

NO_TASKS_POLICY = TenantPolicy(tuple(Limit(window, tasks=0) for window in Window))
"""Limits that refuse everything and report when each window ends."""

STEP_MS = 20 * 60_000


def utc_ms(moment: str) -> int:
    """Return a UTC time in milliseconds."""
    return int(datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()) * 1000


async def refuse_at(store: SeededStore, now: int) -> tuple[PolicyDenial, TenantSnapshot]:
    await store.advance_clock(now - store.now)
    verdict, snapshot = await store.ledger.reserve(ReserveRequest("r", TENANT, (FIRST,), Kind.UPSCALE))
    assert isinstance(verdict, PolicyDenial)
    return verdict, snapshot


@given(now=st.integers(utc_ms("2050-01-01"), utc_ms("2450-01-01")))
@example(now=utc_ms("2052-02-29"))
@example(now=utc_ms("2099-12-31T23:59:59"))
@example(now=utc_ms("2100-02-28T12:00"))
@example(now=utc_ms("2400-02-29T23:59"))
def test_calendar(valkey: Valkey, now: int) -> None:
    """Windows agree with the domain in every century, month and leap year, also after the clock stepped back."""

    async def run() -> None:
        async with open_seeded_store(valkey.url) as store:
            await store.write_registry(1, tenants=(replace(TENANTS[0], policy=NO_TASKS_POLICY),))
            await refuse_at(store, now + STEP_MS)
            verdict, snapshot = await refuse_at(store, now)
        assert verdict.now == now
        assert verdict.violations == tuple(
            Violation(ledger.policy_name(window, ledger.UNIT_TASKS), 0, ledger.window_bounds(window, now)[1])
            for window in Window
        )
        assert {window: item.window_start for window, item in snapshot.state.windows.items()} == {
            window: ledger.window_bounds(window, now)[0] for window in Window
        }

    asyncio.run(run())


async def test_server_time(store: SeededStore) -> None:
    """Answers contain the server's time, to the millisecond."""
    await store.client.delete(store.keys.clock, f"{store.keys.clock}:server")
    before = await store.client.time()
    verdict, _ = await store.ledger.reserve(ReserveRequest("r", TENANT, (FIRST,), Kind.UPSCALE))
    after = await store.client.time()
    assert isinstance(verdict, Grant)
    assert parse_server_time(before) <= verdict.now <= parse_server_time(after)


async def test_work_goes_on_after_a_step_back(store: SeededStore) -> None:
    """Checks and leases continue after the clock steps back by 20 minutes."""
    await store.accept("runs")
    await store.reserve("dies")
    await store.advance_clock(-STEP_MS)
    assert await store.tasks.claim_checks(9) == []
    await store.advance_clock(40_000)  # the ledger's clock advances by nine tenths of it
    assert [claim_check.task.reservation for claim_check in await store.tasks.claim_checks(9)] == ["runs"]
    await store.advance_clock(RETENTION.lease_ms)
    assert [item.reservation for item in await store.ledger.settle_expired(9)] == ["dies"]
    assert await store.ledger.clock_offset() > 0


async def test_lost_submission_of_a_later_period(store: SeededStore) -> None:
    """Windows count a submission that Redis lost and that was made before the clock stepped back from their period."""
    await store.advance_clock(1_000)
    made_at = store.now
    await store.advance_clock(-STEP_MS)
    await store.settle("lost", ReservationState.ACCEPTED, created=made_at)
    await store.advance_clock(STEP_MS)
    _, snapshot = await store.ledger.reserve(ReserveRequest("next", TENANT, (FIRST,), Kind.UPSCALE))
    assert {window: item.tasks for window, item in snapshot.state.windows.items()} == dict.fromkeys(Window, 1)
