"""How long what is kept in Redis is kept: all that belongs to a submission goes by itself, late enough to be of use."""

from __future__ import annotations

import pytest

from service.domain.ledger import Figures, Granted, Idempotency, Refunding, ReservationState, Suggestion
from service.domain.tasks import Kind
from service.storage.ledger import DAY
from service.usecases.ports import Answered, Ask, Check
from tests.storage.store import ACCOUNTS, FIRST, LATER, SECOND, SPANS, TENANT, TENANTS, Store

MONTH = 30 * DAY
KEY = Idempotency("k", "c")
CHECKED = Check(answered=Answered.SUCCEEDED, figures=Figures(8, 0))


async def test_all_goes_by_itself(store: Store) -> None:
    """Nothing is kept for ever but the registry, what it names, the clock, and what leads to that which is kept."""
    await store.accept("r", KEY)
    await store.reserve("s")
    keys = store.keys
    found = {str(each, "ascii"): await store.left(str(each, "ascii")) for each in await store.client.keys()}
    owners = dict.fromkeys([keys.tenant(TENANT), keys.account(FIRST), keys.account(SECOND)])
    assert found == owners | dict.fromkeys(
        [keys.clock, f"{keys.clock}:server", keys.registry, keys.leases, keys.watch]
    ) | {
        keys.reservation("r"): SPANS.keep,
        keys.reservation("s"): SPANS.keep,
        keys.task("r"): SPANS.keep,
        keys.tasks(TENANT): SPANS.keep,
        keys.idempotency(TENANT, "k"): DAY,
        keys.usage(TENANT, LATER // DAY): 400 * DAY,
    }


@pytest.mark.parametrize("outcome", [each for each in ReservationState if each is not ReservationState.RESERVED])
@pytest.mark.parametrize("known", [True, False])
async def test_outcomes(store: Store, outcome: ReservationState, *, known: bool) -> None:
    """A reservation is kept for the whole span from its outcome on, whether or not it was known before."""
    if known:
        await store.reserve("r")
        await store.shorten(store.keys.reservation("r"))
    await store.settle("r", outcome)
    assert await store.left(store.keys.reservation("r")) == SPANS.keep


async def test_lost(store: Store) -> None:
    """The key of a submission that was lost is remembered for a day again."""
    await store.settle("r", ReservationState.ACCEPTED, idempotency=KEY)
    assert await store.left(store.keys.idempotency(TENANT, "k")) == DAY


async def test_moved(store: Store) -> None:
    """A reservation that moves to another account is kept for the whole span from then on."""
    await store.reserve("r")
    await store.shorten(store.keys.reservation("r"))
    ask = Ask("r", TENANT, (SECOND,), Kind.UPSCALE)
    assert isinstance(await store.ledger.retarget(ask, FIRST, None), Granted)
    assert await store.left(store.keys.reservation("r")) == SPANS.keep


async def test_running(store: Store) -> None:
    """A task is kept for the whole span from its last check on, for as long as it runs."""
    await store.accept("r")
    await store.shorten(store.keys.task("r"))
    await store.check(Check(answered=Answered.RUNNING))
    assert await store.left(store.keys.task("r")) == SPANS.keep


async def test_ended(store: Store) -> None:
    """A task can be read for thirty days after its end; its reservation and its day are kept from then on too."""
    await store.accept("r")
    day = store.keys.usage(TENANT, LATER // DAY)
    await store.shorten(store.keys.reservation("r"))
    await store.shorten(day)
    await store.check(CHECKED)
    assert await store.left(store.keys.task("r")) == MONTH
    assert await store.left(store.keys.reservation("r")) == SPANS.keep
    assert await store.left(day) == 400 * DAY


async def test_refunded(store: Store) -> None:
    """A refund keeps a reservation no longer than it was to be kept, but its day, which tells of the refund, is."""
    await store.accept("r")
    await store.check(CHECKED)
    day = store.keys.usage(TENANT, LATER // DAY)
    await store.shorten(store.keys.reservation("r"))
    await store.shorten(day)
    refunded = await store.books.refund(TENANT, "r", "")
    assert refunded
    assert refunded[0] is Refunding.REFUNDED
    assert await store.left(store.keys.reservation("r")) == 60_000
    assert await store.left(day) == 400 * DAY


async def test_told(store: Store) -> None:
    """What the balance tells of a doubtful submission keeps it no longer than it was to be kept."""
    for count in (9, 8):
        await store.reserve(f"r{count}")
        await store.settle(f"r{count}", ReservationState.ACCEPTED, count)
        await store.check(Check(answered=Answered.SUCCEEDED, figures=Figures(count, 0)))
    await store.reserve("doubtful")
    await store.settle("doubtful", ReservationState.UNKNOWN)
    await store.shorten(store.keys.reservation("doubtful"))
    await store.wait(1)
    await store.reserve("next")
    await store.settle("next", ReservationState.ACCEPTED, 6)
    told = await store.books.submission("doubtful")
    assert told
    assert told.suggests is Suggestion.CHARGED
    assert await store.left(store.keys.reservation("doubtful")) == 60_000


async def test_list(store: Store) -> None:
    """The list of a tenant's tasks forgets those that nobody can read any more, and them only."""
    await store.accept("old")
    await store.wait(1)
    await store.accept("kept")
    await store.wait(SPANS.keep - 1)
    await store.shorten(store.keys.tasks(TENANT))
    await store.accept("new")
    assert await store.client.zrange(store.keys.tasks(TENANT), 0, -1) == [b"kept", b"new"]
    assert await store.left(store.keys.tasks(TENANT)) == SPANS.keep


async def test_deleted(store: Store) -> None:
    """What is known of a deleted tenant or account stays for as long as its last tasks may need it, from each on."""
    await store.accept("r")
    owners = store.keys.tenant(TENANT), store.keys.account(FIRST)
    await store.change(1, drop_tenants=TENANTS, drop_accounts=ACCOUNTS)
    assert [await store.left(each) for each in owners] == [2 * MONTH] * 2
    for each in owners:
        await store.shorten(each)
    await store.check(CHECKED)
    assert [await store.left(each) for each in owners] == [2 * MONTH] * 2


async def test_restored(store: Store) -> None:
    """A tenant or an account that is given back to a store is kept for ever again."""
    await store.accept("r")
    await store.change(1, drop_tenants=TENANTS, drop_accounts=ACCOUNTS)
    await store.change(2, tenants=TENANTS, accounts=ACCOUNTS)
    await store.check(CHECKED)
    owners = store.keys.tenant(TENANT), store.keys.account(FIRST)
    assert [await store.left(each) for each in owners] == [None] * 2
