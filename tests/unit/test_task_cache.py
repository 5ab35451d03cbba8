"""The cache of tasks and its subscriptions."""

from __future__ import annotations

import asyncio

import pytest

from service.domain.errors import Overloaded
from service.domain.tasks import Kind, State, Task
from service.usecases import caches
from service.usecases.caches import CachedTask, DurationEstimator, Subscription, TaskCache
from tests.support.tasks import CREATED_AT, make_succeeded_task, make_task
from tests.unit.fake_gateway import wait_until

QUEUED = make_task()
RUNNING = make_task(state=State.RUNNING, version=2)
ENDED = make_succeeded_task(5)
LONG_SECONDS = 1e6


@pytest.fixture
def cache() -> TaskCache:
    return TaskCache(DurationEstimator(2.5))


async def start_waiting(watcher: Subscription, version: int) -> asyncio.Task[CachedTask | None]:
    wait = asyncio.create_task(watcher.wait_for_change(version, LONG_SECONDS))
    await wait_until(lambda: watcher._wakeup is not None)
    return wait


def test_older_versions_are_ignored(cache: TaskCache) -> None:
    running = make_task(state=State.RUNNING, version=2, last_checked_at=CREATED_AT + 9)
    cache.put(running, CREATED_AT + 9)
    assert cache.put(QUEUED, CREATED_AT + 10).task is running
    earlier = make_task(state=State.RUNNING, version=2, last_checked_at=CREATED_AT + 8)
    assert cache.put(earlier, CREATED_AT + 8).task is running
    later = make_task(state=State.RUNNING, version=2, last_checked_at=CREATED_AT + 11)
    assert cache.put(later, CREATED_AT + 11).task is later
    assert cache.latest("r1") == cache.get_fresh("r1")


def test_finished_task_stays_finished(cache: TaskCache) -> None:
    """The store may have lost the task and count its versions from 1 again."""
    cache.put(ENDED, CREATED_AT)
    assert cache.put(make_task(state=State.RUNNING, version=9), CREATED_AT + 10).task is ENDED
    again = make_succeeded_task(7)
    assert cache.put(again, CREATED_AT + 11).task is again


async def test_end_of_the_same_version_wakes_waiters(cache: TaskCache) -> None:
    """The store may have lost the task and count its versions from 1 again."""
    cache.put(RUNNING, CREATED_AT)
    with cache.subscribe("r1") as watcher:
        wait = await start_waiting(watcher, 2)
        ended = make_task(state=State.SUCCEEDED, version=2)
        cache.on_published(ended, CREATED_AT + 1)
        result = await wait
    assert result
    assert result.task is ended


def test_read_after_a_clock_step_is_no_older(cache: TaskCache) -> None:
    cache.put(make_task(last_checked_at=CREATED_AT + 1_200_000), CREATED_AT + 1_200_000)
    later = make_task(last_checked_at=CREATED_AT)
    assert cache.put(later, CREATED_AT).task is later


def test_finished_task_is_verified_once_per_interval(cache: TaskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(ENDED, CREATED_AT)
    assert not cache.claim_verification("r1")
    monkeypatch.setattr(caches, "FINISHED_TTL_SECONDS", -1)
    cache.put(make_task(reservation="r2"), CREATED_AT)
    assert (cache.claim_verification("r1"), cache.claim_verification("r2"), cache.claim_verification("r3")) == (
        True,
        False,
        False,
    )
    monkeypatch.undo()
    assert not cache.claim_verification("r1")


def test_cache_lifetimes(cache: TaskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(RUNNING, CREATED_AT)
    assert cache.get_fresh("r1")
    monkeypatch.setattr(caches, "RUNNING_TTL_SECONDS", -1)
    assert cache.get_fresh("r1") is None
    assert cache.latest("r1")
    cache.put(ENDED, CREATED_AT)
    assert cache.get_fresh("r1")


async def test_change_before_the_wait_is_not_missed(cache: TaskCache) -> None:
    with cache.subscribe("r1") as watcher:
        cache.on_published(RUNNING, CREATED_AT)
        result = await watcher.wait_for_change(1, 0)
    assert result
    assert result.task is RUNNING


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
    assert result
    assert result.task is ENDED


async def test_wait_times_out(cache: TaskCache) -> None:
    with cache.subscribe("r1") as watcher:
        assert await watcher.wait_for_change(1, 0.001) is None
        assert await watcher.wait_for_change(1, -1) is None


async def test_closing_wakes_all_waiters(cache: TaskCache) -> None:
    with cache.subscribe("r1") as one, cache.subscribe("r2") as other:
        waits = [await start_waiting(one, 1), await start_waiting(other, 1)]
        cache.close()
        async with asyncio.timeout(20):
            assert await asyncio.gather(*waits) == [None, None]
            assert await one.wait_for_change(1, LONG_SECONDS) is None
        cache.put(ENDED, CREATED_AT)
        assert await one.wait_for_change(1, LONG_SECONDS) is not None


async def test_change_wakes_all_waiters(cache: TaskCache) -> None:
    crowd = 10_000

    async def wait() -> CachedTask | None:
        with cache.subscribe("r1") as watcher:
            return await watcher.wait_for_change(1, LONG_SECONDS)

    waits = [asyncio.create_task(wait()) for _ in range(crowd)]
    await wait_until(lambda: cache.subscription_count == crowd)
    cache.on_published(ENDED, CREATED_AT)
    assert set(map(id, await asyncio.gather(*waits))) == {id(cache.latest("r1"))}
    assert cache.subscription_count == 0


def test_waiters_beyond_the_limit_are_refused() -> None:
    cache = TaskCache(DurationEstimator(2.5), max_subscriptions=2)
    with cache.subscribe("r1"):
        with cache.subscribe("r2"):
            with pytest.raises(Overloaded) as caught, cache.subscribe("r1"):
                pass
            assert caught.value.retry_after
        with cache.subscribe("r1"):
            assert cache.subscription_count == 2
    assert cache.subscription_count == 0


async def test_every_waiter_is_released(cache: TaskCache) -> None:
    with cache.subscribe("r1"):
        assert cache.subscribed_ids() == ["r1"]
        with cache.subscribe("r1") as watcher:
            wait = await start_waiting(watcher, 1)
            wait.cancel()
            with pytest.raises(asyncio.CancelledError):
                await wait
        assert cache.subscribed_ids() == ["r1"]
    assert cache.subscribed_ids() == []


@pytest.mark.parametrize("notify", [TaskCache.on_published, TaskCache.on_recorded])
def test_changes_of_unread_tasks_are_not_cached(cache: TaskCache, notify: object) -> None:
    assert callable(notify)
    notify(cache, ENDED, CREATED_AT)
    assert cache.latest("r1") is None
    with cache.subscribe("r1"):
        notify(cache, RUNNING, CREATED_AT)
    notify(cache, ENDED, CREATED_AT)
    cached = cache.latest("r1")
    assert cached
    assert cached.task is ENDED


def test_duration_is_learned_once(cache: TaskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    taught: list[Task] = []
    monkeypatch.setattr(cache.durations, "record_end", taught.append)
    cache.on_recorded(ENDED, CREATED_AT)
    cache.on_published(RUNNING, CREATED_AT)
    cache.on_published(ENDED, CREATED_AT)
    assert taught == [ENDED]


def test_least_recently_read_is_evicted(cache: TaskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MAX_CACHED_TASKS", 2)
    with cache.subscribe("a"):
        for name in "abcd":
            cache.put(make_succeeded_task(1, reservation=name), CREATED_AT)
            cache.get_fresh("b")
        assert [name for name in "abcd" if cache.latest(name)] == ["a", "b", "d"]
    cache.put(make_task(reservation="e", kind=Kind.SEAMLESS), CREATED_AT)
    assert [name for name in "abcde" if cache.latest(name)] == ["b", "e"]


def test_age_counts_from_the_last_check(cache: TaskCache) -> None:
    cached = cache.put(make_task(last_checked_at=CREATED_AT), CREATED_AT + 4_000)
    assert 4 <= cached.age_seconds < 5
