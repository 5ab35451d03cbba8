"""Submissions with partly lost data, as after a restore of older data."""

from __future__ import annotations

import pytest

from service.domain.ledger import Balance, ReservationState
from service.domain.tasks import Cost, CostBasis, State
from service.domain.tenants import Window
from service.usecases.ports import CheckOutcome, CheckResult
from tests.storage.seeded_store import FIRST, RETENTION, TENANT, SeededStore

SUCCEEDED_CHECK = CheckResult(outcome=CheckOutcome.SUCCEEDED, balance=Balance(8, 0))
UNKNOWN_COST = Cost(0, 0, CostBasis.UNKNOWN)


@pytest.mark.parametrize("owner", ["tenant", "account"])
async def test_lost_owner(store: SeededStore, owner: str) -> None:
    """A task ends with a cost although the state of its tenant or account is lost."""
    await store.accept("r")
    await store.client.delete(store.keys.tenant(TENANT) if owner == "tenant" else store.keys.account(FIRST))
    await store.record_check(SUCCEEDED_CHECK)
    record = await store.tasks.get("r")
    assert record
    assert (record[0].state, record[0].cost) == (State.SUCCEEDED, Cost(1, 0, CostBasis.ESTIMATED))


async def test_lost_reservation(store: SeededStore) -> None:
    """A task without its reservation ends at an unknown cost, and its windows stay unchanged."""
    await store.accept("r")
    await store.client.delete(store.keys.reservation("r"))
    before = await store.ledger.tenant_snapshot(TENANT)
    await store.record_check(SUCCEEDED_CHECK)
    record = await store.tasks.get("r")
    assert record
    assert (record[0].state, record[0].cost) == (State.SUCCEEDED, UNKNOWN_COST)
    assert (await store.ledger.tenant_snapshot(TENANT)).state == before.state


async def test_lost_and_settled_as_unknown(store: SeededStore) -> None:
    """A task whose reservation was lost and then settled as unknown is charged once."""
    await store.accept("r")
    await store.client.delete(store.keys.reservation("r"))
    await store.settle("r", ReservationState.UNKNOWN)
    before = await store.ledger.tenant_snapshot(TENANT)
    await store.record_check(SUCCEEDED_CHECK)
    assert (await store.ledger.tenant_snapshot(TENANT)).state == before.state
    known = await store.ledger.get_reservation("r")
    assert known
    assert (known.state, known.cost) == (ReservationState.UNKNOWN, None)


async def test_lost_behind_an_index(store: SeededStore) -> None:
    """A check without its task, or a lease without its reservation, is dropped and delays no other."""
    await store.accept("gone", "kept")
    await store.client.delete(store.keys.task("gone"))
    await store.advance_clock(RETENTION.claim_lease_ms)
    assert await store.tasks.touch(["gone"]) == [None]
    assert [check.task.reservation for check in await store.tasks.claim_checks(9)] == ["kept"]
    assert await store.next_check_ms("gone") is None
    await store.reserve("gone-too")
    await store.reserve("kept-too")
    await store.client.delete(store.keys.reservation("gone-too"))
    await store.advance_clock(RETENTION.lease_ms)
    assert len(await store.ledger.settle_expired(9)) == 1
    assert await store.client.zcard(store.keys.leases) == 0
    known = await store.ledger.get_reservation("kept-too")
    assert known
    assert known.state is ReservationState.UNKNOWN


async def test_windows_of_the_creation(store: SeededStore) -> None:
    """A lost submission is charged in the windows of its creation, except those that have ended."""
    created = store.now
    await store.advance_clock(60_000)
    await store.settle("r", ReservationState.ACCEPTED, created=created)
    snapshot = await store.ledger.tenant_snapshot(TENANT)
    charged = {window: item.tasks for window, item in snapshot.state.windows.items()}
    assert charged == {item: int(item is Window.TOTAL) for item in Window}
