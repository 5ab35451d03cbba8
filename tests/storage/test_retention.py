"""Retention: everything about a submission expires by itself, but not too early."""

from __future__ import annotations

import pytest

from service.domain.ledger import Balance, Grant, Idempotency, InferredCharge, RefundResult, ReservationState
from service.domain.tasks import Kind
from service.storage.redis import DAY_MS
from service.usecases.ports import CheckOutcome, CheckResult, ReserveRequest
from tests.storage.seeded_store import ACCOUNTS, FIRST, RETENTION, SECOND, START_MS, TENANT, TENANTS, SeededStore

MONTH_MS = 30 * DAY_MS
KEY = Idempotency("k", "c")
SUCCEEDED_CHECK = CheckResult(outcome=CheckOutcome.SUCCEEDED, balance=Balance(8, 0))


async def test_everything_expires(store: SeededStore) -> None:
    """Only the registry, its references and the clock have no expiry."""
    await store.accept("r", idempotency=KEY)
    await store.reserve("s")
    keys = store.keys
    results = {str(item, "ascii"): await store.ttl_ms(str(item, "ascii")) for item in await store.client.keys()}
    owners = dict.fromkeys([keys.tenant(TENANT), keys.account(FIRST), keys.account(SECOND)])
    assert results == owners | dict.fromkeys(
        [keys.clock, f"{keys.clock}:server", keys.registry, keys.leases, keys.poll_due]
    ) | {
        keys.reservation("r"): RETENTION.keep_ms,
        keys.reservation("s"): RETENTION.keep_ms,
        keys.task("r"): RETENTION.keep_ms,
        keys.tenant_tasks(TENANT): RETENTION.keep_ms,
        keys.idempotency(TENANT, "k"): DAY_MS,
        keys.usage(TENANT, START_MS // DAY_MS): 400 * DAY_MS,
    }


@pytest.mark.parametrize("outcome", [item for item in ReservationState if item is not ReservationState.RESERVED])
@pytest.mark.parametrize("known", [True, False])
async def test_outcomes(store: SeededStore, outcome: ReservationState, *, known: bool) -> None:
    """A reservation is kept for the whole retention from its outcome on, even if reserved long before."""
    if known:
        await store.reserve("r")
        await store.shorten_ttl(store.keys.reservation("r"))
    await store.settle("r", outcome)
    assert await store.ttl_ms(store.keys.reservation("r")) == RETENTION.keep_ms


async def test_lost(store: SeededStore) -> None:
    """The idempotency key of a lost submission is kept for another day."""
    await store.settle("r", ReservationState.ACCEPTED, idempotency=KEY)
    assert await store.ttl_ms(store.keys.idempotency(TENANT, "k")) == DAY_MS


async def test_moved(store: SeededStore) -> None:
    """A change of account restarts the retention."""
    await store.reserve("r")
    await store.shorten_ttl(store.keys.reservation("r"))
    ask = ReserveRequest("r", TENANT, (SECOND,), Kind.UPSCALE)
    assert isinstance(await store.ledger.change_account(ask, FIRST, None), Grant)
    assert await store.ttl_ms(store.keys.reservation("r")) == RETENTION.keep_ms


async def test_running(store: SeededStore) -> None:
    """A running task is kept for the whole retention from its last check on."""
    await store.accept("r")
    await store.shorten_ttl(store.keys.task("r"))
    await store.record_check(CheckResult(outcome=CheckOutcome.RUNNING))
    assert await store.ttl_ms(store.keys.task("r")) == RETENTION.keep_ms


async def test_ended(store: SeededStore) -> None:
    """A task is kept for thirty days after its end, and so are its reservation and its day."""
    await store.accept("r")
    day = store.keys.usage(TENANT, START_MS // DAY_MS)
    await store.shorten_ttl(store.keys.reservation("r"))
    await store.shorten_ttl(day)
    await store.record_check(SUCCEEDED_CHECK)
    assert await store.ttl_ms(store.keys.task("r")) == MONTH_MS
    assert await store.ttl_ms(store.keys.reservation("r")) == RETENTION.keep_ms
    assert await store.ttl_ms(day) == 400 * DAY_MS


async def test_refunded(store: SeededStore) -> None:
    """A refund does not extend a reservation, but does extend the day that records it."""
    await store.accept("r")
    await store.record_check(SUCCEEDED_CHECK)
    day = store.keys.usage(TENANT, START_MS // DAY_MS)
    await store.shorten_ttl(store.keys.reservation("r"))
    await store.shorten_ttl(day)
    refunded = await store.ledger.refund(TENANT, "r", "")
    assert refunded
    assert refunded[0] is RefundResult.REFUNDED
    assert await store.ttl_ms(store.keys.reservation("r")) == 60_000
    assert await store.ttl_ms(day) == 400 * DAY_MS


async def test_inferred(store: SeededStore) -> None:
    """An inferred charge does not extend the retention of a submission."""
    for count in (9, 8):
        await store.reserve(f"r{count}")
        await store.settle(f"r{count}", ReservationState.ACCEPTED, count)
        await store.record_check(CheckResult(outcome=CheckOutcome.SUCCEEDED, balance=Balance(count, 0)))
    await store.reserve("doubtful")
    await store.settle("doubtful", ReservationState.UNKNOWN)
    await store.shorten_ttl(store.keys.reservation("doubtful"))
    await store.advance_clock(1)
    await store.reserve("next")
    await store.settle("next", ReservationState.ACCEPTED, 6)
    reported = await store.ledger.get_reservation("doubtful")
    assert reported
    assert reported.inferred_charge is InferredCharge.CHARGED
    assert await store.ttl_ms(store.keys.reservation("doubtful")) == 60_000


async def test_list(store: SeededStore) -> None:
    """The list drops exactly the tasks that have expired."""
    await store.accept("old")
    await store.advance_clock(1)
    await store.accept("kept")
    await store.advance_clock(RETENTION.keep_ms - 1)
    await store.shorten_ttl(store.keys.tenant_tasks(TENANT))
    await store.accept("new")
    assert await store.client.zrange(store.keys.tenant_tasks(TENANT), 0, -1) == [b"kept", b"new"]
    assert await store.ttl_ms(store.keys.tenant_tasks(TENANT)) == RETENTION.keep_ms


async def test_deleted(store: SeededStore) -> None:
    """State of a deleted tenant or account is kept for as long as its last tasks may need it."""
    await store.accept("r")
    owners = store.keys.tenant(TENANT), store.keys.account(FIRST)
    await store.write_registry(1, drop_tenants=TENANTS, drop_accounts=ACCOUNTS)
    assert [await store.ttl_ms(item) for item in owners] == [2 * MONTH_MS] * 2
    for owner in owners:
        await store.shorten_ttl(owner)
    await store.record_check(SUCCEEDED_CHECK)
    assert [await store.ttl_ms(item) for item in owners] == [2 * MONTH_MS] * 2


async def test_restored(store: SeededStore) -> None:
    """A restored tenant or account has no expiry again."""
    await store.accept("r")
    await store.write_registry(1, drop_tenants=TENANTS, drop_accounts=ACCOUNTS)
    await store.write_registry(2, tenants=TENANTS, accounts=ACCOUNTS)
    await store.record_check(SUCCEEDED_CHECK)
    owners = store.keys.tenant(TENANT), store.keys.account(FIRST)
    assert [await store.ttl_ms(owner) for owner in owners] == [None] * 2
