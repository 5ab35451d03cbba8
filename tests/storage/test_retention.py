"""How long what is kept in Redis is kept: all that belongs to a submission goes by itself, late enough to be of use."""

from __future__ import annotations

import pytest

from service.domain.ledger import Balance, Grant, Idempotency, InferredCharge, RefundResult, ReservationState
from service.domain.tasks import Kind
from service.storage.ledger import DAY_MS
from service.usecases.ports import CheckOutcome, CheckResult, ReserveRequest
from tests.storage.seeded_store import ACCOUNTS, FIRST, RETENTION, SECOND, START_MS, TENANT, TENANTS, SeededStore

MONTH_MS = 30 * DAY_MS
KEY = Idempotency("k", "c")
SUCCEEDED_CHECK = CheckResult(outcome=CheckOutcome.SUCCEEDED, balance=Balance(8, 0))


async def test_all_goes_by_itself(store: SeededStore) -> None:
    """Nothing is kept for ever but the registry, what it names, the clock, and what leads to that which is kept."""
    await store.accept("r", KEY)
    await store.reserve("s")
    keys = store.keys
    found = {str(each, "ascii"): await store.ttl_ms(str(each, "ascii")) for each in await store.client.keys()}
    owners = dict.fromkeys([keys.tenant(TENANT), keys.account(FIRST), keys.account(SECOND)])
    assert found == owners | dict.fromkeys(
        [keys.clock, f"{keys.clock}:server", keys.registry, keys.leases, keys.poll_due]
    ) | {
        keys.reservation("r"): RETENTION.keep_ms,
        keys.reservation("s"): RETENTION.keep_ms,
        keys.task("r"): RETENTION.keep_ms,
        keys.tenant_tasks(TENANT): RETENTION.keep_ms,
        keys.idempotency(TENANT, "k"): DAY_MS,
        keys.usage(TENANT, START_MS // DAY_MS): 400 * DAY_MS,
    }


@pytest.mark.parametrize("outcome", [each for each in ReservationState if each is not ReservationState.RESERVED])
@pytest.mark.parametrize("known", [True, False])
async def test_outcomes(store: SeededStore, outcome: ReservationState, *, known: bool) -> None:
    """A reservation is kept for the whole span from its outcome on, whether or not it was known before."""
    if known:
        await store.reserve("r")
        await store.shorten_ttl(store.keys.reservation("r"))
    await store.settle("r", outcome)
    assert await store.ttl_ms(store.keys.reservation("r")) == RETENTION.keep_ms


async def test_lost(store: SeededStore) -> None:
    """The key of a submission that was lost is remembered for a day again."""
    await store.settle("r", ReservationState.ACCEPTED, idempotency=KEY)
    assert await store.ttl_ms(store.keys.idempotency(TENANT, "k")) == DAY_MS


async def test_moved(store: SeededStore) -> None:
    """A reservation that moves to another account is kept for the whole span from then on."""
    await store.reserve("r")
    await store.shorten_ttl(store.keys.reservation("r"))
    ask = ReserveRequest("r", TENANT, (SECOND,), Kind.UPSCALE)
    assert isinstance(await store.ledger.change_account(ask, FIRST, None), Grant)
    assert await store.ttl_ms(store.keys.reservation("r")) == RETENTION.keep_ms


async def test_running(store: SeededStore) -> None:
    """A task is kept for the whole span from its last check on, for as long as it runs."""
    await store.accept("r")
    await store.shorten_ttl(store.keys.task("r"))
    await store.record_check(CheckResult(outcome=CheckOutcome.RUNNING))
    assert await store.ttl_ms(store.keys.task("r")) == RETENTION.keep_ms


async def test_ended(store: SeededStore) -> None:
    """A task can be read for thirty days after its end; its reservation and its day are kept from then on too."""
    await store.accept("r")
    day = store.keys.usage(TENANT, START_MS // DAY_MS)
    await store.shorten_ttl(store.keys.reservation("r"))
    await store.shorten_ttl(day)
    await store.record_check(SUCCEEDED_CHECK)
    assert await store.ttl_ms(store.keys.task("r")) == MONTH_MS
    assert await store.ttl_ms(store.keys.reservation("r")) == RETENTION.keep_ms
    assert await store.ttl_ms(day) == 400 * DAY_MS


async def test_refunded(store: SeededStore) -> None:
    """A refund keeps a reservation no longer than it was to be kept, but its day, which tells of the refund, is."""
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


async def test_told(store: SeededStore) -> None:
    """What the balance tells of a doubtful submission keeps it no longer than it was to be kept."""
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
    told = await store.ledger.get_reservation("doubtful")
    assert told
    assert told.inferred_charge is InferredCharge.CHARGED
    assert await store.ttl_ms(store.keys.reservation("doubtful")) == 60_000


async def test_list(store: SeededStore) -> None:
    """The list of a tenant's tasks forgets those that nobody can read any more, and them only."""
    await store.accept("old")
    await store.advance_clock(1)
    await store.accept("kept")
    await store.advance_clock(RETENTION.keep_ms - 1)
    await store.shorten_ttl(store.keys.tenant_tasks(TENANT))
    await store.accept("new")
    assert await store.client.zrange(store.keys.tenant_tasks(TENANT), 0, -1) == [b"kept", b"new"]
    assert await store.ttl_ms(store.keys.tenant_tasks(TENANT)) == RETENTION.keep_ms


async def test_deleted(store: SeededStore) -> None:
    """What is known of a deleted tenant or account stays for as long as its last tasks may need it, from each on."""
    await store.accept("r")
    owners = store.keys.tenant(TENANT), store.keys.account(FIRST)
    await store.write_registry(1, drop_tenants=TENANTS, drop_accounts=ACCOUNTS)
    assert [await store.ttl_ms(each) for each in owners] == [2 * MONTH_MS] * 2
    for each in owners:
        await store.shorten_ttl(each)
    await store.record_check(SUCCEEDED_CHECK)
    assert [await store.ttl_ms(each) for each in owners] == [2 * MONTH_MS] * 2


async def test_restored(store: SeededStore) -> None:
    """A tenant or an account that is given back to a store is kept for ever again."""
    await store.accept("r")
    await store.write_registry(1, drop_tenants=TENANTS, drop_accounts=ACCOUNTS)
    await store.write_registry(2, tenants=TENANTS, accounts=ACCOUNTS)
    await store.record_check(SUCCEEDED_CHECK)
    owners = store.keys.tenant(TENANT), store.keys.account(FIRST)
    assert [await store.ttl_ms(each) for each in owners] == [None] * 2
