"""The cache of tasks with its subscriptions, and the estimate of durations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from service.domain.tasks import Kind, State, Task
from service.usecases import caches
from service.usecases.caches import CachedTask, DurationEstimator, Subscription, TaskCache
from tests.support.tasks import CREATED_AT, make_succeeded_task, make_task

QUEUED = make_task()
RUNNING = make_task(state=State.RUNNING, version=2)
ENDED = make_succeeded_task(5)
LONG_SECONDS = 1e6


@pytest.fixture
def cache() -> TaskCache:
    return TaskCache(DurationEstimator(2.5))


async def start_waiting(watcher: Subscription, version: int) -> asyncio.Task[CachedTask | None]:
    wait = asyncio.create_task(watcher.wait_for_change(version, LONG_SECONDS))
    while watcher._wakeup is None:
        await asyncio.sleep(0)
    return wait


def running_task(last_checked_at: int, version: int = 2) -> Task:
    return make_task(state=State.RUNNING, version=version, last_checked_at=CREATED_AT + last_checked_at)


@pytest.mark.parametrize(
    ("known", "new", "replaces"),
    [
        (running_task(9), QUEUED, False),
        (running_task(9), running_task(8), False),
        (running_task(9), running_task(11), True),
        (running_task(1_200_000), running_task(0), True),  # the clock stepped back
        (ENDED, running_task(10, version=9), False),  # the store lost the task and counts from 1 again
        (ENDED, make_succeeded_task(7), True),
    ],
)
def test_replacement(cache: TaskCache, known: Task, new: Task, replaces: bool) -> None:
    cache.put(known, known.last_checked_at)
    assert cache.put(new, new.last_checked_at).task is (new if replaces else known)
    latest = cache.latest("r1")
    assert latest
    assert latest.task is (new if replaces else known)


async def test_waiter_gets_the_newest_version(cache: TaskCache) -> None:
    cache.put(QUEUED, CREATED_AT)
    with cache.subscribe("r1") as watcher:
        wait = await start_waiting(watcher, 1)
        cache.put(make_task(last_checked_at=CREATED_AT + 1), CREATED_AT + 1)
        cache.put(make_task(reservation="r2", version=7), CREATED_AT + 1)
        await asyncio.sleep(0)
        assert not wait.done()
        cache.on_recorded(RUNNING, CREATED_AT + 2)
        cache.on_published(ENDED, CREATED_AT + 3)
        result = await wait
        assert result is await watcher.wait_for_change(1, 0)  # a change before the wait is not missed
    assert result
    assert result.task is ENDED


async def test_end_of_the_same_version_wakes_waiters(cache: TaskCache) -> None:
    # The store may have lost the task and count its versions from 1 again.
    cache.put(RUNNING, CREATED_AT)
    with cache.subscribe("r1") as watcher:
        wait = await start_waiting(watcher, 2)
        cache.on_published(make_task(state=State.SUCCEEDED, version=2), CREATED_AT + 1)
        assert await wait is cache.latest("r1")


@pytest.mark.parametrize("notify", [TaskCache.on_published, TaskCache.on_recorded])
def test_changes_of_unread_tasks_are_not_cached(
    cache: TaskCache, notify: Callable[[TaskCache, Task, int], None]
) -> None:
    notify(cache, ENDED, CREATED_AT)
    assert cache.latest("r1") is None
    with cache.subscribe("r1"):
        notify(cache, RUNNING, CREATED_AT)
    notify(cache, ENDED, CREATED_AT)
    cached = cache.latest("r1")
    assert cached
    assert cached.task is ENDED


def test_least_recently_read_is_evicted(cache: TaskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MAX_CACHED_TASKS", 2)
    with cache.subscribe("a"):
        for name in "abcd":
            cache.put(make_succeeded_task(1, reservation=name), CREATED_AT)
            cache.get_fresh("b")
        assert [name for name in "abcd" if cache.latest(name)] == ["a", "b", "d"]
    cache.put(make_task(reservation="e", kind=Kind.SEAMLESS), CREATED_AT)
    assert [name for name in "abcde" if cache.latest(name)] == ["b", "e"]


@pytest.mark.parametrize(
    ("durations", "ages", "expected"),
    [
        ([], [0], [3]),  # the poll interval
        ([12.2], [0, 4, 9.7, 12, 500], [13, 9, 3, 3, 3]),
        ([300], [0, 269, 280], [30, 30, 20]),
        ([10, 20], [0], [12]),  # each end moves the estimate by a fifth
    ],
)
def test_retry_after(durations: list[float], ages: list[float], expected: list[int]) -> None:
    estimator = DurationEstimator(2.5)
    for seconds in durations:
        estimator.record_end(make_succeeded_task(seconds))
    estimator.record_end(make_task(state=State.FAILED, updated_at=CREATED_AT + 1_800_000))
    assert [estimator.retry_after(QUEUED, CREATED_AT + int(age * 1000)) for age in ages] == expected
    assert estimator.retry_after(make_task(kind=Kind.SEAMLESS), CREATED_AT) == 3
