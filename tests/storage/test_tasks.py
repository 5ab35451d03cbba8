"""Listing tasks, and when they are checked."""

from __future__ import annotations

from service.domain.tasks import State
from service.storage.redis import MAX_CHECK_BACKOFF_MS, MAX_CHECK_INTERVAL_MS
from service.usecases.ports import CheckOutcome, CheckResult, TaskPage
from tests.storage.seeded_store import HOUR_MS, RETENTION, TENANT, SeededStore

RUNNING, NO_RESPONSE, SUCCEEDED = CheckOutcome.RUNNING, CheckOutcome.NO_RESPONSE, CheckOutcome.SUCCEEDED
INTERVAL_MS = RETENTION.check_interval_ms


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
    for limit in (7, 100, 229, 230, 231):
        assert await read_all_pages(store, limit) == names[::-1]
    assert await read_all_pages(store, 5, State.SUCCEEDED) == []
    ended = await store.check_due_task(SUCCEEDED)
    assert ended
    assert await read_all_pages(store, 5, State.SUCCEEDED) == [ended.reservation]
    assert len(await read_all_pages(store, 50, State.QUEUED)) == 229


async def test_list_that_changes(store: SeededStore) -> None:
    """Added tasks move no other to another page, and a cursor stays valid when its task and its neighbours are lost."""
    names = [f"r{number:02}" for number in range(40)]
    await store.accept(*names)
    listed, cursor = list[str](), None
    for number in range(len(names)):
        page = await read_page(store, cursor, 10)
        listed += [task.reservation for task in page.tasks]
        cursor = page.next_cursor
        if cursor is None:
            break
        await store.accept(f"z{number:02}", f"a{number:02}")
    assert [name for name in listed if not name.startswith("a")] == names[::-1]
    assert len(listed) == len(set(listed))
    first = await read_page(store, None, 10)
    for name in [task.reservation for task in first.tasks] + ["r33", "r32"]:
        await store.client.delete(store.keys.task(name))
        await store.client.zrem(store.keys.tenant_tasks(TENANT), name)
    following = await read_page(store, first.next_cursor, 2)
    assert [task.reservation for task in following.tasks] == ["r31", "r30"]


async def test_touch(store: SeededStore) -> None:
    """Tasks are checked ever more rarely until they are touched: at once, then at every interval."""
    await store.accept("r1", "r2")
    await store.client.zrem(store.keys.poll_due, "r2")
    touched = await store.tasks.touch(["r2", "never", "r1"])
    assert [item and (item[0].reservation, item[1]) for item in touched] == [("r2", store.now), None, ("r1", store.now)]
    await store.client.delete(store.keys.poll_watched("r1"))
    await store.check_due_task(RUNNING)
    await store.advance_clock(HOUR_MS)
    await store.check_due_task(RUNNING)
    assert await store.next_check_ms("r1") == MAX_CHECK_INTERVAL_MS
    await store.tasks.touch(["r1"])
    assert await store.next_check_ms("r1") == 0
    assert 0 < await store.client.pttl(store.keys.poll_watched("r1")) <= RETENTION.watched_ms
    await store.check_due_task(RUNNING)
    assert await store.next_check_ms("r1") == INTERVAL_MS
    await store.tasks.touch(["r1"])
    assert await store.next_check_ms("r1") == INTERVAL_MS


async def test_touch_during_a_check(store: SeededStore) -> None:
    """Touching a task during its check schedules the next one soon; touching an ended one stores nothing."""
    await store.accept("r1")
    await store.advance_clock(HOUR_MS)
    (due,) = await store.tasks.claim_checks(1)
    await store.tasks.touch(["r1"])
    await store.tasks.record_check(due, CheckResult(outcome=RUNNING))
    assert await store.next_check_ms("r1") == INTERVAL_MS
    await store.check_due_task(SUCCEEDED)
    before = sorted(await store.client.keys())
    await store.tasks.touch(["r1", "never"])
    assert sorted(await store.client.keys()) == before
    assert await store.next_check_ms("r1") is None


async def test_failing_checks(store: SeededStore) -> None:
    """Failing checks back off to a minute however often the task is touched; a success resets that."""
    await store.accept("r1")
    intervals = []
    for _ in range(6):
        await store.check_due_task(NO_RESPONSE)
        await store.tasks.touch(["r1"])
        intervals.append(await store.next_check_ms("r1"))
    assert intervals == [5_000, 10_000, 20_000, 40_000, MAX_CHECK_BACKOFF_MS, MAX_CHECK_BACKOFF_MS]
    await store.check_due_task(RUNNING)
    assert await store.next_check_ms("r1") == INTERVAL_MS


async def test_claims(store: SeededStore) -> None:
    """A check is claimed by one process until its lease expires; a slow one and its replacement record one end."""
    await store.accept("r1")
    await store.advance_clock(INTERVAL_MS)
    (slow,) = await store.tasks.claim_checks(5)
    await store.advance_clock(RETENTION.claim_lease_ms - 1)
    assert await store.tasks.claim_checks(5) == []
    await store.advance_clock(1)
    (second,) = await store.tasks.claim_checks(5)
    assert await store.tasks.record_check(second, CheckResult(outcome=SUCCEEDED))
    assert await store.tasks.record_check(slow, CheckResult(outcome=RUNNING)) is None
    await store.advance_clock(HOUR_MS)
    assert await store.tasks.claim_checks(5) == []
    assert await store.client.zcard(store.keys.poll_claimed) == 0
