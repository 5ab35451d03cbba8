"""Retention: everything about a submission expires by itself, but not too early."""

from __future__ import annotations

from service.domain.ledger import Balance, Grant, Idempotency, InferredCharge, RefundResult, ReservationState
from service.domain.tasks import Kind
from service.storage.redis import DAY_MS
from service.usecases.ports import CheckOutcome, CheckResult, ReserveRequest
from tests.storage.seeded_store import ACCOUNTS, FIRST, RETENTION, SECOND, START_MS, TENANT, TENANTS, SeededStore

HOUR_MS = 3_600_000
MONTH_MS = 30 * DAY_MS
KEY = Idempotency("k", "c")
SUCCEEDED_CHECK = CheckResult(outcome=CheckOutcome.SUCCEEDED, balance=Balance(8, 0))


async def ttl_ms(store: SeededStore, key: str) -> int | None:
    """Return the time to live of a key, rounded up to minutes; None without expiry."""
    result = int(await store.client.pttl(key))
    assert result != -2, f"{key} is gone"
    return None if result < 0 else -(-result // 60_000) * 60_000


async def shorten_ttl(store: SeededStore, *keys: str) -> None:
    """Reduce the time to live of keys to one minute."""
    for key in keys:
        assert await store.client.pexpire(key, 60_000)


async def test_everything_expires(store: SeededStore) -> None:
    """Only the registry, its references and the clock have no expiry."""
    await store.accept("r", idempotency=KEY)
    await store.reserve("s")
    keys = store.keys
    results = {str(item, "ascii"): await ttl_ms(store, str(item, "ascii")) for item in await store.client.keys()}
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


async def test_prolonged(store: SeededStore) -> None:
    """An outcome and a check restart the retention; the key of a lost submission is kept a day."""
    keys = store.keys
    for outcome in (ReservationState.ACCEPTED, ReservationState.REFUSED, ReservationState.NOT_SENT):
        await store.reserve(outcome)
        await shorten_ttl(store, keys.reservation(outcome))
        await store.settle(outcome, outcome)
        assert await ttl_ms(store, keys.reservation(outcome)) == RETENTION.keep_ms
    running = keys.task(ReservationState.ACCEPTED)
    await shorten_ttl(store, running)
    await store.record_check(CheckResult(outcome=CheckOutcome.RUNNING))
    assert await ttl_ms(store, running) == RETENTION.keep_ms
    await store.settle("lost", ReservationState.ACCEPTED, idempotency=KEY)
    assert await ttl_ms(store, keys.idempotency(TENANT, "k")) == DAY_MS


async def test_unknown(store: SeededStore) -> None:
    """Neither a change of account nor an unknown outcome prolongs a submission, also one that Redis lost."""
    key, lost = store.keys.reservation("moved"), store.keys.reservation("lost")
    await store.reserve("moved")
    await shorten_ttl(store, key)
    ask = ReserveRequest("moved", TENANT, (SECOND,), Kind.UPSCALE)
    assert isinstance(await store.ledger.change_account(ask, FIRST, None), Grant)
    assert await ttl_ms(store, key) == 60_000
    assert await store.ledger.settle_expired(1) == []
    await store.advance_clock(RETENTION.lease_ms)
    assert await store.ledger.settle_expired(1)
    assert await ttl_ms(store, key) == 60_000
    await store.settle("lost", ReservationState.UNKNOWN, created=store.now - DAY_MS)
    assert await ttl_ms(store, lost) == RETENTION.keep_ms - DAY_MS


async def test_oldest_unknown_is_moved_by_a_reset(store: SeededStore) -> None:
    """A reset of the clock moves a submission of unknown outcome at the end of its retention."""
    await store.reserve("doubtful")
    await store.settle("doubtful", ReservationState.UNKNOWN)
    await store.advance_clock(RETENTION.keep_ms + HOUR_MS)
    await store.ledger.reserve(ReserveRequest("other", TENANT, (FIRST,), Kind.UPSCALE))
    await store.advance_clock(-HOUR_MS)
    assert await store.ledger.reset_clock([TENANT], []) == HOUR_MS
    reservation = await store.ledger.get_reservation("doubtful")
    assert reservation
    assert (reservation.created_at, reservation.settled_at) == (START_MS, START_MS - HOUR_MS)


async def test_ended_and_refunded(store: SeededStore) -> None:
    """A task is kept for thirty days after its end; a refund prolongs only the day that records it."""
    await store.accept("r")
    reservation, day = store.keys.reservation("r"), store.keys.usage(TENANT, START_MS // DAY_MS)
    await shorten_ttl(store, reservation, day)
    await store.record_check(SUCCEEDED_CHECK)
    assert await ttl_ms(store, store.keys.task("r")) == MONTH_MS
    assert [await ttl_ms(store, key) for key in (reservation, day)] == [RETENTION.keep_ms, 400 * DAY_MS]
    await shorten_ttl(store, reservation, day)
    refunded = await store.ledger.refund(TENANT, "r", "")
    assert refunded
    assert refunded[0] is RefundResult.REFUNDED
    assert [await ttl_ms(store, key) for key in (reservation, day)] == [60_000, 400 * DAY_MS]


async def test_inferred(store: SeededStore) -> None:
    """An inferred charge does not extend the retention of a submission."""
    for count in (9, 8):
        await store.reserve(f"r{count}")
        await store.settle(f"r{count}", ReservationState.ACCEPTED, count)
        await store.record_check(CheckResult(outcome=CheckOutcome.SUCCEEDED, balance=Balance(count, 0)))
    await store.reserve("doubtful")
    await store.settle("doubtful", ReservationState.UNKNOWN)
    await shorten_ttl(store, store.keys.reservation("doubtful"))
    await store.advance_clock(1)
    await store.reserve("next")
    await store.settle("next", ReservationState.ACCEPTED, 6)
    reported = await store.ledger.get_reservation("doubtful")
    assert reported
    assert reported.inferred_charge is InferredCharge.CHARGED
    assert await ttl_ms(store, store.keys.reservation("doubtful")) == 60_000


async def test_list(store: SeededStore) -> None:
    """The list drops exactly the tasks that have expired."""
    await store.accept("old")
    await store.advance_clock(1)
    await store.accept("kept")
    await store.advance_clock(RETENTION.keep_ms - 1)
    await store.accept("new")
    assert await store.client.zrange(store.keys.tenant_tasks(TENANT), 0, -1) == [b"kept", b"new"]


async def test_deleted_and_restored(store: SeededStore) -> None:
    """State of a deleted tenant or account is kept for as long as its last tasks may need it."""
    await store.accept("r", "s")
    owners = store.keys.tenant(TENANT), store.keys.account(FIRST)
    await store.write_registry(1, drop_tenants=TENANTS, drop_accounts=ACCOUNTS)
    for _ in range(2):
        assert [await ttl_ms(store, owner) for owner in owners] == [2 * MONTH_MS] * 2
        await shorten_ttl(store, *owners)
        await store.record_check(SUCCEEDED_CHECK)
    await store.write_registry(2, tenants=TENANTS, accounts=ACCOUNTS)
    assert [await ttl_ms(store, owner) for owner in owners] == [None] * 2
