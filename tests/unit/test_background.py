"""Background tasks and jobs, the cache of tasks with its subscriptions, clocks and the estimate of durations."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from service import container
from service.container import Container
from service.domain.ledger import LedgerClock
from service.domain.tasks import Cost, CostBasis, Kind, State, Task
from service.settings import Settings
from service.telemetry import logging
from service.telemetry.logging import WaitTimer, upstream_wait
from service.telemetry.metrics import Metrics
from service.usecases import caches
from service.usecases.background import TaskSupervisor, cancel_and_wait, run_in_turns
from service.usecases.caches import CachedRegistry, CachedTask, DurationEstimator, Subscription, TaskCache
from tests.behaviour.gateway_fixture import ENVIRONMENT

CREATED_AT = 1_790_000_000_000

TASK = Task(
    id="task_1",
    reservation="r1",
    tenant=1,
    account=2,
    kind=Kind.UPSCALE,
    state=State.QUEUED,
    created_at=CREATED_AT,
    updated_at=CREATED_AT,
    finished_at=None,
    options=Raw(b"{}"),
    metadata=Raw(b"{}"),
    artifacts=(),
    error=None,
    cost=Cost(0, 0, CostBasis.UNKNOWN),
    version=1,
    last_checked_at=CREATED_AT,
)


def make_task(**changes: Any) -> Task:
    return replace(TASK, **changes)


def make_succeeded_task(seconds: float, **changes: Any) -> Task:
    """Make a task that succeeded after so many seconds."""
    end = CREATED_AT + int(seconds * 1000)
    return make_task(state=State.SUCCEEDED, updated_at=end, finished_at=end, version=3, **changes)


@pytest.mark.parametrize("fails", [False, True])
async def test_work_and_what_it_starts_outlive_the_caller(caplog: pytest.LogCaptureFixture, fails: bool) -> None:
    supervisor, go, done = TaskSupervisor(), asyncio.Event(), []

    async def finish() -> None:
        await asyncio.sleep(0)
        done.append(1)

    async def work() -> None:
        await go.wait()
        supervisor.spawn(finish())
        if fails:
            raise ValueError("without a caller")

    waiting = asyncio.create_task(asyncio.wait_for(asyncio.shield(supervisor.spawn(work())), 60))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go.set()
    assert await supervisor.drain(60) == 0
    gc.collect()
    assert done
    assert caplog.records == []


async def test_drain_cancels_after_the_timeout() -> None:
    supervisor, cancelled = TaskSupervisor(), []

    async def work(name: str) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(name)
            if name == "first":
                supervisor.spawn(work("second"))
                await asyncio.sleep(0)
            raise

    supervisor.spawn(work("first"))
    await asyncio.sleep(0)
    assert await supervisor.drain(0) == 2
    assert cancelled == ["first", "second"]
    assert await supervisor.drain(0) == 0


async def test_swallowed_cancellation_is_repeated() -> None:
    """`asyncio.wait_for` can lose a cancellation."""
    lost = 0

    async def deaf() -> None:
        nonlocal lost
        while lost < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                lost += 1
        raise asyncio.CancelledError

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    await cancel_and_wait([task], retry_seconds=0.01)
    assert (task.cancelled(), lost) == (True, 2)


async def test_computation_in_turns_lets_others_run() -> None:
    others = asyncio.Event()

    def steps() -> Iterator[int]:
        for step in range(10_000_000):
            yield step
            if others.is_set():
                return

    asyncio.get_running_loop().call_soon(others.set)
    results = await run_in_turns(steps())
    assert others.is_set()
    assert results == list(range(len(results)))


async def test_failed_jobs_are_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "JOB_RESTART_SECONDS", 0)
    begun, third = [], asyncio.Event()

    async def job() -> None:
        begun.append(1)
        if len(begun) == 1:
            raise ValueError("a fault of ours")
        if len(begun) == 3:
            third.set()
            await asyncio.Event().wait()

    ports = ("ledger", "tasks", "deliveries", "upstream", "task_cache", "fetch_artifact", "fetch_image", "post_webhook")
    adapters: Any = dict.fromkeys([*ports, "user_keys"])  # which are never called
    adapters["registry"] = CachedRegistry(cast("Any", None))
    settings = Settings.load(ENVIRONMENT | {"GATEWAY_REDIS_URL": "redis://localhost"})
    services = Container(settings, Metrics(CollectorRegistry()), TaskSupervisor(), **adapters)
    services.jobs = [job]
    async with services.run_jobs(), asyncio.timeout(60):
        await third.wait()
    assert len(begun) == 3


START, MINUTE = 1_790_000_000_000, 60_000


def test_clock_slows_down_after_a_step_back() -> None:
    # Nine tenths of the speed, until both clocks agree.
    clock = LedgerClock(START, 0).advance(START - 20 * MINUTE)
    assert clock.last_ms == START
    ahead = clock.advance(START - 10 * MINUTE)
    assert ahead.last_ms == START + 9 * MINUTE
    assert ahead.advance(START + 180 * MINUTE) == LedgerClock(START + 180 * MINUTE, 0)


@given(st.lists(st.integers(-2_000_000, 2_000_000) | st.integers(0, 30)))
def test_clock_never_goes_back(steps: list[int]) -> None:
    wall, clock = START, LedgerClock(START, 0)
    for step in steps:
        wall += step
        after = clock.advance(wall)
        assert after.last_ms >= max(clock.last_ms, wall)
        if step > 0:
            assert after.last_ms - clock.last_ms >= step * 9 // 10
        clock = after


def test_concurrent_waits_count_once() -> None:
    times = iter([0, 4, 9, 10])
    timer = WaitTimer(lambda: float(next(times)))
    assert timer.seconds is None
    timer.start()
    timer.start()
    timer.stop()
    timer.stop()
    timer.start()
    timer.stop()
    assert timer.seconds == 5


async def test_waits_in_child_tasks_count() -> None:
    go = asyncio.Event()

    async def waits() -> None:
        with upstream_wait():
            await go.wait()

    async def request(work: list[asyncio.Task[None]]) -> float | None:
        with logging.WaitTimer() as mine:
            if work:
                return mine.seconds
            work.append(asyncio.create_task(waits()))
            await asyncio.sleep(0)
            go.set()
            await work[0]
            return mine.seconds

    shared: list[asyncio.Task[None]] = []
    first, second = await asyncio.gather(request(shared), request(shared))
    assert first is not None
    assert first > 0
    assert second is None


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
