"""Lists of tasks, and what becomes of submissions whose data was partly lost, as after a restore of older data."""

from __future__ import annotations

import pytest

from service.domain.ledger import Balance, ReservationState
from service.domain.tasks import Cost, CostBasis, State
from service.domain.tenants import Window
from service.storage import tasks as tasks_module
from service.usecases.ports import CheckOutcome, CheckResult, TaskPage
from tests.storage.seeded_store import FIRST, RETENTION, TENANT, SeededStore

SUCCEEDED_CHECK = CheckResult(outcome=CheckOutcome.SUCCEEDED, balance=Balance(8, 0))


async def read_page(store: SeededStore, cursor: str | None, limit: int, state: State | None = None) -> TaskPage:
    return await store.tasks.list_page(TENANT, state=state, kind=None, limit=limit, cursor=cursor)


async def read_all_pages(store: SeededStore, limit: int, state: State | None = None) -> list[str]:
    names, cursor = list[str](), None
    while True:
        page = await read_page(store, cursor, limit, state)
        assert len(page.tasks) <= limit
        names += [task.reservation for task in page.tasks]
        cursor = page.next_cursor
        if cursor is None:
            return names


async def test_list_of_one_millisecond(store: SeededStore) -> None:
    """Tasks created at once have a stable order across pages, and are found however few match."""
    names = [f"r{number:03}" for number in range(230)]
    await store.accept(*names)
    for limit in (7, 100, 230):
        assert await read_all_pages(store, limit) == names[::-1]
    ended = await store.record_check(SUCCEEDED_CHECK)
    assert await read_all_pages(store, 5, State.SUCCEEDED) == [ended.reservation]
    assert len(await read_all_pages(store, 50, State.QUEUED)) == 229


async def test_list_with_gaps(store: SeededStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request reads a bounded number of tasks, expired ones included; the next one goes on after them."""
    monkeypatch.setattr(tasks_module, "_MAX_SCANNED", 8)
    names = [f"r{number:02}" for number in range(20)]
    for name in names:
        await store.advance_clock(1)
        await store.accept(name)
    await store.client.delete(*(store.keys.task(name) for name in names[2:18]))
    newest, empty, oldest = "r19 r18", "", "r01 r00"
    cursor, pages = None, list[str]()
    while len(pages) < 9:
        page = await read_page(store, cursor, 2, State.QUEUED)
        pages.append(" ".join(task.reservation for task in page.tasks))
        cursor = page.next_cursor
        if cursor is None:
            break
    assert pages == [newest, empty, oldest]
    assert await read_all_pages(store, 2) == [*newest.split(), *oldest.split()]


async def test_list_that_changes(store: SeededStore) -> None:
    """Added tasks move no other to another page, and a cursor stays valid when its task and its neighbours are lost."""
    names = [f"r{number:02}" for number in range(20)]
    await store.accept(*names)
    first = await read_page(store, None, 5)
    await store.accept("z", "a")
    rest = await read_page(store, first.next_cursor, 20)
    listed = [task.reservation for task in (*first.tasks, *rest.tasks)]
    assert [name for name in listed if name != "a"] == names[::-1]
    for name in [task.reservation for task in first.tasks] + ["r14", "r13"]:
        await store.client.delete(store.keys.task(name))
        await store.client.zrem(store.keys.tenant_tasks(TENANT), name)
    following = await read_page(store, first.next_cursor, 2)
    assert [task.reservation for task in following.tasks] == ["r12", "r11"]


async def test_lost_tenant_and_account(store: SeededStore) -> None:
    """A task ends with a cost although the state of its tenant and account is lost."""
    await store.accept("r")
    await store.client.delete(store.keys.tenant(TENANT), store.keys.account(FIRST))
    ended = await store.record_check(SUCCEEDED_CHECK)
    assert (ended.state, ended.cost) == (State.SUCCEEDED, Cost(1, 0, CostBasis.ESTIMATED))


async def test_lost_reservation(store: SeededStore) -> None:
    """A task whose reservation was lost, or settled as unknown since, is charged once."""
    await store.accept("lost", "unknown")
    await store.client.delete(*(store.keys.reservation(name) for name in ("lost", "unknown")))
    await store.settle("unknown", ReservationState.UNKNOWN)
    for _ in range(2):
        ended = await store.record_check(SUCCEEDED_CHECK)
        assert (ended.state, ended.cost.basis) == (State.SUCCEEDED, CostBasis.UNKNOWN)
    assert (await store.ledger.tenant_snapshot(TENANT)).state.windows[Window.TOTAL].tasks == 3


async def test_lost_behind_an_index(store: SeededStore) -> None:
    """A check without its task, or a lease without its reservation, is dropped and delays no other."""
    await store.accept("gone", "kept")
    await store.reserve("gone-too")
    await store.reserve("kept-too")
    await store.client.delete(store.keys.task("gone"), store.keys.reservation("gone-too"))
    await store.advance_clock(RETENTION.lease_ms)
    assert await store.tasks.touch(["gone"]) == [None]
    assert [check.task.reservation for check in await store.tasks.claim_checks(9)] == ["kept"]
    assert await store.client.zscore(store.keys.poll_due, "gone") is None
    assert [item.reservation for item in await store.ledger.settle_expired(9)] == ["kept-too"]
    assert await store.client.zcard(store.keys.leases) == 0


async def test_windows_of_the_creation(store: SeededStore) -> None:
    """A lost submission is charged in the windows of its creation, except those that have ended."""
    created = store.now
    await store.advance_clock(60_000)
    await store.settle("r", ReservationState.ACCEPTED, created=created)
    snapshot = await store.ledger.tenant_snapshot(TENANT)
    charged = {window: item.tasks for window, item in snapshot.state.windows.items()}
    assert charged == {item: int(item is Window.TOTAL) for item in Window}


async def test_awaited_tasks_are_checked_first(store: SeededStore) -> None:
    """They precede checks that have been due for longer, until their next check."""
    await store.accept("first", "second")
    await store.advance_clock(1)
    await store.accept("awaited", "read")
    await store.tasks.touch(["read"])
    await store.tasks.touch(["awaited"], is_awaited=True)
    await store.advance_clock(RETENTION.check_interval_ms)
    claimed = await store.tasks.claim_checks(2)
    assert [(check.task.reservation, check.due_at - store.now) for check in claimed] == [("awaited", 0), ("first", -1)]
    assert len(await store.tasks.record_running(claimed)) == 2
    await store.advance_clock(RETENTION.check_interval_ms)
    assert [check.task.reservation for check in await store.tasks.claim_checks(2)] == ["second", "read"]


async def test_checks_recorded_together(store: SeededStore) -> None:
    """Those of tasks that ended or were lost meanwhile change nothing, and only visible changes are returned."""
    await store.accept("ended", "lost", "running")
    for returned in (["running"], []):
        await store.advance_clock(RETENTION.check_interval_ms)
        claimed = await store.tasks.claim_checks(9)
        if claimed[0].task.reservation == "ended":
            await store.tasks.record_check(claimed[0], SUCCEEDED_CHECK)
        await store.client.delete(store.keys.task("lost"))
        assert [task.reservation for task, _ in await store.tasks.record_running(claimed)] == returned
        due = await store.client.zrange(store.keys.poll_due, 0, -1, withscores=True)
        assert due == [(b"running", store.now + RETENTION.check_interval_ms)]
        assert await store.client.zcard(store.keys.poll_claimed) == 0
        stored = await store.tasks.get("running")
        assert stored
        assert (stored[0].state, stored[0].last_checked_at) == (State.RUNNING, store.now)


async def test_released_checks_are_due_at_once(store: SeededStore) -> None:
    """Those of other processes, and those that were recorded, are not."""
    await store.accept("mine", "other", "recorded")
    await store.advance_clock(RETENTION.check_interval_ms)
    mine, other, recorded = await store.tasks.claim_checks(3)
    await store.tasks.record_running([recorded])
    await store.tasks.release_checks([mine, recorded])
    assert [check.task.reservation for check in await store.tasks.claim_checks(3)] == ["mine"]
    assert other.task.reservation == "other"
