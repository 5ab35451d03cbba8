"""What becomes of a submission of which the store has lost a part, as after a restore of older data."""

from __future__ import annotations

import pytest

from service.domain.ledger import Figures, ReservationState
from service.domain.tasks import Basis, Cost, State
from service.domain.tenants import Window
from service.usecases.ports import Answered, Check
from tests.storage.store import FIRST, SPANS, TENANT, Store

ENDED = Check(answered=Answered.SUCCEEDED, figures=Figures(8, 0))
UNKNOWN = Cost(0, 0, Basis.UNKNOWN)


@pytest.mark.parametrize("owner", ["tenant", "account"])
async def test_lost_owner(store: Store, owner: str) -> None:
    """A task ends with a receipt although the counters of its tenant, or what was known of its account, are gone."""
    await store.accept("r")
    await store.client.delete(store.keys.tenant(TENANT) if owner == "tenant" else store.keys.account(FIRST))
    await store.check(ENDED)
    found = await store.tasks.get("r")
    assert found
    assert (found[0].state, found[0].cost) == (State.SUCCEEDED, Cost(1, 0, Basis.ESTIMATED))


async def test_lost_reservation(store: Store) -> None:
    """A task of which the reservation is gone ends at an unknown cost, and what its windows hold stays as it is."""
    await store.accept("r")
    await store.client.delete(store.keys.reservation("r"))
    before = await store.ledger.counters(TENANT)
    await store.check(ENDED)
    found = await store.tasks.get("r")
    assert found
    assert (found[0].state, found[0].cost) == (State.SUCCEEDED, UNKNOWN)
    assert (await store.ledger.counters(TENANT)).state == before.state


async def test_reservation_lost_and_found_unknown(store: Store) -> None:
    """A task whose reservation was lost, and then settled as unknown, ends without a second charge."""
    await store.accept("r")
    await store.client.delete(store.keys.reservation("r"))
    await store.settle("r", ReservationState.UNKNOWN)
    before = await store.ledger.counters(TENANT)
    await store.check(ENDED)
    assert (await store.ledger.counters(TENANT)).state == before.state
    known = await store.books.submission("r")
    assert known
    assert (known.state, known.cost) == (ReservationState.UNKNOWN, None)


async def test_lost_task(store: Store) -> None:
    """A task that is gone is no longer watched, and keeps no other from its check."""
    await store.accept("gone")
    await store.accept("kept")
    await store.client.delete(store.keys.task("gone"))
    await store.wait(SPANS.claim)
    assert [each.task.reservation for each in await store.tasks.claim(9)] == ["kept"]
    assert await store.client.zrange(store.keys.watch, 0, -1) == []
    assert await store.client.zrange(store.keys.claims, 0, -1) == [b"kept"]


async def test_lost_behind_a_lease(store: Store) -> None:
    """A lease of which the reservation is gone is forgotten, and keeps no other from its end."""
    await store.reserve("gone")
    await store.reserve("kept")
    await store.client.delete(store.keys.reservation("gone"))
    await store.wait(SPANS.lease)
    assert len(await store.ledger.expire(9)) == 1
    assert await store.client.zcard(store.keys.leases) == 0
    known = await store.books.submission("kept")
    assert known
    assert known.state is ReservationState.UNKNOWN


async def test_windows_of_the_creation(store: Store) -> None:
    """A submission that was lost is charged in the windows of its creation: those that are over by then lack it."""
    created = store.now
    await store.wait(60_000)
    await store.settle("r", ReservationState.ACCEPTED, created=created)
    snapshot = await store.ledger.counters(TENANT)
    charged = {window: each.tasks for window, each in snapshot.state.windows.items()}
    assert charged == {each: int(each is Window.TOTAL) for each in Window}
