"""The board shows nothing old, wakes everybody who waits, and holds no more than it has to."""

from __future__ import annotations

import asyncio

import pytest

from service.domain.errors import Overloaded
from service.domain.tasks import Kind, State, Task
from service.usecases import task_cache
from service.usecases.task_cache import CachedTask, DurationEstimator, Subscription, TaskCache
from tests.support.tasks import CREATED_AT, make_succeeded_task, make_task
from tests.unit.fake_gateway import wait_until

QUEUED = make_task()
RUNNING = make_task(state=State.RUNNING, version=2)
ENDED = make_succeeded_task(5)
LONG_SECONDS = 1e6
"""Seconds that no test waits for."""


@pytest.fixture
def board() -> TaskCache:
    """The board of a process that begins."""
    return TaskCache(DurationEstimator(2.5))


async def start_waiting(watcher: Subscription, version: int) -> asyncio.Task[CachedTask | None]:
    """A wait for a later version, which has begun."""
    wait = asyncio.create_task(watcher.wait_for_change(version, LONG_SECONDS))
    await wait_until(lambda: watcher._wakeup is not None)
    return wait


def test_never_back(board: TaskCache) -> None:
    """Once a version was seen no older one is shown, nor what was known of the same version before."""
    running = make_task(state=State.RUNNING, version=2, checked=CREATED_AT + 9)
    board.put(running, CREATED_AT + 9)
    assert board.put(QUEUED, CREATED_AT + 10).task is running
    earlier = make_task(state=State.RUNNING, version=2, checked=CREATED_AT + 8)
    assert board.put(earlier, CREATED_AT + 8).task is running
    later = make_task(state=State.RUNNING, version=2, checked=CREATED_AT + 11)
    assert board.put(later, CREATED_AT + 11).task is later
    assert board.latest("r1") == board.get_fresh("r1")


def test_an_end_is_never_taken_back(board: TaskCache) -> None:
    """What has ended stays so, though the store has lost it and counts its versions anew."""
    board.put(ENDED, CREATED_AT)
    assert board.put(make_task(state=State.RUNNING, version=9), CREATED_AT + 10).task is ENDED
    again = make_succeeded_task(7)
    assert board.put(again, CREATED_AT + 11).task is again


async def test_an_end_of_the_same_version(board: TaskCache) -> None:
    """Who waits is woken by an end, whatever its version: the store may have lost the task and count anew."""
    board.put(RUNNING, CREATED_AT)
    with board.subscribe("r1") as watcher:
        wait = await start_waiting(watcher, 2)
        ended = make_task(state=State.SUCCEEDED, version=2)
        board.on_published(ended, CREATED_AT + 1)
        seen = await wait
    assert seen
    assert seen.task is ended


def test_checked_before_the_clock_stepped_back(board: TaskCache) -> None:
    """What is read after the server's clock has stepped back is no older than what was read before."""
    board.put(make_task(checked=CREATED_AT + 1_200_000), CREATED_AT + 1_200_000)
    later = make_task(checked=CREATED_AT)
    assert board.put(later, CREATED_AT).task is later


def test_verified_once(board: TaskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all who read a task that has ended the first one per interval has the store asked; of a running one none."""
    board.put(ENDED, CREATED_AT)
    assert not board.claim_verification("r1")
    monkeypatch.setattr(task_cache, "FINISHED_TTL_SECONDS", -1)
    board.put(make_task(reservation="r2"), CREATED_AT)
    assert (board.claim_verification("r1"), board.claim_verification("r2"), board.claim_verification("r3")) == (
        True,
        False,
        False,
    )
    monkeypatch.undo()
    assert not board.claim_verification("r1")


def test_how_long_it_is_shown(board: TaskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that runs is shown from memory for a moment, one that has ended for good."""
    board.put(RUNNING, CREATED_AT)
    assert board.get_fresh("r1")
    monkeypatch.setattr(task_cache, "RUNNING_TTL_SECONDS", -1)
    assert board.get_fresh("r1") is None
    assert board.latest("r1")
    board.put(ENDED, CREATED_AT)
    assert board.get_fresh("r1")


async def test_a_change_before_the_wait(board: TaskCache) -> None:
    """A change between the read and the wait is not missed."""
    with board.subscribe("r1") as watcher:
        board.on_published(RUNNING, CREATED_AT)
        seen = await watcher.wait_for_change(1, 0)
    assert seen
    assert seen.task is RUNNING


async def test_woken_by_the_newest(board: TaskCache) -> None:
    """Who waits is woken by a later version, by no repetition, and finds the newest, however many there were."""
    board.put(QUEUED, CREATED_AT)
    with board.subscribe("r1") as watcher:
        wait = await start_waiting(watcher, 1)
        board.put(make_task(checked=CREATED_AT + 1), CREATED_AT + 1)
        board.put(make_task(reservation="r2", version=7), CREATED_AT + 1)
        await asyncio.sleep(0)
        assert not wait.done()
        board.on_recorded(RUNNING, CREATED_AT + 2)
        board.on_published(ENDED, CREATED_AT + 3)
        seen = await wait
    assert seen
    assert seen.task is ENDED


async def test_time_over(board: TaskCache) -> None:
    """Who has waited for long enough is told that there is nothing."""
    with board.subscribe("r1") as watcher:
        assert await watcher.wait_for_change(1, 0.001) is None
        assert await watcher.wait_for_change(1, -1) is None


async def test_closed(board: TaskCache) -> None:
    """When the process ends all who wait are told so at once, and nobody waits any more; a change is still told."""
    with board.subscribe("r1") as one, board.subscribe("r2") as other:
        waits = [await start_waiting(one, 1), await start_waiting(other, 1)]
        board.close()
        async with asyncio.timeout(20):
            assert await asyncio.gather(*waits) == [None, None]
            assert await one.wait_for_change(1, LONG_SECONDS) is None
        board.put(ENDED, CREATED_AT)
        assert await one.wait_for_change(1, LONG_SECONDS) is not None


async def test_a_crowd(board: TaskCache) -> None:
    """One change wakes all who wait for the task, at once."""
    crowd = 10_000

    async def wait() -> CachedTask | None:
        with board.subscribe("r1") as watcher:
            return await watcher.wait_for_change(1, LONG_SECONDS)

    waits = [asyncio.create_task(wait()) for _ in range(crowd)]
    await wait_until(lambda: board.subscription_count == crowd)
    board.on_published(ENDED, CREATED_AT)
    assert set(map(id, await asyncio.gather(*waits))) == {id(board.latest("r1"))}
    assert board.subscription_count == 0


def test_no_more_than_so_many() -> None:
    """So many may wait at once; the next is refused until one has left."""
    board = TaskCache(DurationEstimator(2.5), max_subscriptions=2)
    with board.subscribe("r1"):
        with board.subscribe("r2"):
            with pytest.raises(Overloaded) as told, board.subscribe("r1"):
                pass
            assert told.value.retry_after
        with board.subscribe("r1"):
            assert board.subscription_count == 2
    assert board.subscription_count == 0


async def test_nothing_is_left_behind(board: TaskCache) -> None:
    """Whoever leaves, in whatever way, is forgotten."""
    with board.subscribe("r1"):
        assert board.subscribed_ids() == ["r1"]
        with board.subscribe("r1") as watcher:
            wait = await start_waiting(watcher, 1)
            wait.cancel()
            with pytest.raises(asyncio.CancelledError):
                await wait
        assert board.subscribed_ids() == ["r1"]
    assert board.subscribed_ids() == []


@pytest.mark.parametrize("told", [TaskCache.on_published, TaskCache.on_recorded])
def test_what_is_not_asked_for(board: TaskCache, told: object) -> None:
    """A change of a task that nobody has asked for is not kept."""
    assert callable(told)
    told(board, ENDED, CREATED_AT)
    assert board.latest("r1") is None
    with board.subscribe("r1"):
        told(board, RUNNING, CREATED_AT)
    told(board, ENDED, CREATED_AT)
    seen = board.latest("r1")
    assert seen
    assert seen.task is ENDED


def test_learns_once(board: TaskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every end teaches how long tasks take when it is announced, and not once more where it was recorded."""
    taught: list[Task] = []
    monkeypatch.setattr(board.durations, "record_end", taught.append)
    board.on_recorded(ENDED, CREATED_AT)
    board.on_published(RUNNING, CREATED_AT)
    board.on_published(ENDED, CREATED_AT)
    assert taught == [ENDED]


def test_the_oldest_is_forgotten(board: TaskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many tasks those that were asked for last are remembered, and all that somebody waits for."""
    monkeypatch.setattr(task_cache, "MAX_CACHED_TASKS", 2)
    with board.subscribe("a"):
        for name in "abcd":
            board.put(make_succeeded_task(1, reservation=name), CREATED_AT)
            board.get_fresh("b")
        assert [name for name in "abcd" if board.latest(name)] == ["a", "b", "d"]
    board.put(make_task(reservation="e", kind=Kind.SEAMLESS), CREATED_AT)
    assert [name for name in "abcde" if board.latest(name)] == ["b", "e"]


def test_age(board: TaskCache) -> None:
    """The age of what is known counts from the last word of the upstream."""
    seen = board.put(make_task(checked=CREATED_AT), CREATED_AT + 4_000)
    assert 4 <= seen.age_seconds < 5
