"""Waiting for tasks is shared between callers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest

from service.domain.errors import UpstreamUnavailable
from service.domain.tasks import State, Task
from service.usecases import caches
from service.usecases.ports import CheckOutcome, CheckResult
from service.usecases.task_status import TaskReader
from tests.unit.fake_gateway import FakeGateway, wait_until

READER_COUNT = 2_000
LONG_SECONDS = 1e6
"""Longer than any test."""


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> FakeGateway:
    """Use cases of a process that does not cache running tasks."""
    monkeypatch.setattr(caches, "RUNNING_TTL_SECONDS", -1)
    return FakeGateway()


@pytest.fixture
def store_reads(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Delay and record every read of the store."""
    calls: list[Sequence[str]] = []
    touch = gateway.ledger.touch

    async def noted(reservations: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        calls.append(reservations)
        await asyncio.sleep(0)
        return await touch(reservations)

    monkeypatch.setattr(gateway.ledger, "touch", noted)
    return calls


async def advance_interval(gateway: FakeGateway) -> None:
    gateway.ledger.clock.now_ms += gateway.ledger.retention.check_interval_ms
    while await gateway.poller.start_due():
        pass
    await gateway.poller.wait_idle()


async def test_many_waiters_cost_one_read_and_one_check_per_interval(
    gateway: FakeGateway, store_reads: list[Sequence[str]]
) -> None:
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=LONG_SECONDS)
    gateway.upstream.next_checks += [CheckResult(outcome=CheckOutcome.RUNNING)] * 2
    waits = [
        asyncio.create_task(follow.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS))
        for _ in range(READER_COUNT)
    ]
    await wait_until(lambda: gateway.ledger.cache.subscription_count == READER_COUNT)
    for _ in range(3):
        await advance_interval(gateway)
    results = await asyncio.gather(*waits)
    assert {item.task.state for item in results} == {State.SUCCEEDED}
    assert len(gateway.upstream.checks) == 3
    assert store_reads == [[task.reservation]]


async def test_cancelled_reader_does_not_cancel_others(gateway: FakeGateway, store_reads: list[Sequence[str]]) -> None:
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=LONG_SECONDS)
    first, second = (asyncio.create_task(follow.read(gateway.tenant, task.id)) for _ in range(2))
    await wait_until(lambda: bool(store_reads))
    first.cancel()
    assert (await second).task == task
    assert len(store_reads) == 1
    await follow.read(gateway.tenant, task.id)
    assert len(store_reads) == 2


async def test_end_recorded_during_the_read_wakes_the_waiter(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=LONG_SECONDS)
    touch = gateway.ledger.touch

    async def overtaken(reservations: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        read = await touch(reservations)
        await advance_interval(gateway)
        return read

    monkeypatch.setattr(gateway.ledger, "touch", overtaken)
    async with asyncio.timeout(20):
        result = await follow.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS)
    assert result.task.state is State.SUCCEEDED


async def test_older_version_of_the_store_is_not_shown(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=LONG_SECONDS)
    before = await gateway.ledger.touch([task.reservation])
    gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.RUNNING))
    await follow.read(gateway.tenant, task.id)
    await advance_interval(gateway)

    async def lagging(_: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        return before

    monkeypatch.setattr(gateway.ledger, "touch", lagging)
    assert (await follow.read(gateway.tenant, task.id)).task.state is State.RUNNING


@asynccontextmanager
async def run_touching(follow: TaskReader) -> AsyncIterator[None]:
    touching = asyncio.create_task(follow.touch_watched())
    try:
        yield
    finally:
        touching.cancel()
        await asyncio.gather(touching, return_exceptions=True)


async def test_missed_notification_is_found_later(gateway: FakeGateway, store_reads: list[Sequence[str]]) -> None:
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=0)
    wait = asyncio.create_task(follow.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS))
    await wait_until(lambda: gateway.ledger.cache.subscription_count == 1 and len(store_reads) == 1)
    gateway.ledger.cache = gateway.poller.cache = caches.TaskCache(gateway.ledger.cache.durations)
    await advance_interval(gateway)
    gateway.ledger.is_unavailable = True
    async with run_touching(follow):
        await wait_until(lambda: len(store_reads) >= 4)
        assert not wait.done()
        gateway.ledger.is_unavailable = False
        assert (await wait).task.state is State.SUCCEEDED


async def test_only_watched_tasks_are_touched(gateway: FakeGateway, store_reads: list[Sequence[str]]) -> None:
    tasks = [(await gateway.submit_image()).task for _ in range(150)]
    follow = gateway.make_reader(interval=0)
    for task in tasks[:5]:
        await follow.read(gateway.tenant, task.id)
    waits = [asyncio.create_task(follow.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS)) for task in tasks[5:]]
    await wait_until(lambda: len(store_reads) == len(tasks))
    store_reads.clear()
    async with run_touching(follow):
        await wait_until(lambda: len(store_reads) >= 2)
    assert sorted(name for batch in store_reads[:2] for name in batch) == sorted(t.reservation for t in tasks[5:])
    gateway.ledger.cache.close()
    await asyncio.gather(*waits)


async def test_unavailable_task_is_not_awaited(gateway: FakeGateway) -> None:
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=LONG_SECONDS)
    gateway.ledger.is_unavailable = True
    gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.NO_RESPONSE))
    with pytest.raises(UpstreamUnavailable):
        await follow.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS)
    assert gateway.ledger.cache.subscription_count == 0


async def test_query_during_an_outage_keeps_known_fields(gateway: FakeGateway) -> None:
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=0)
    await follow.read(gateway.tenant, task.id)
    gateway.ledger.is_unavailable = True
    gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.RUNNING))
    running, ended = [await follow.read(gateway.tenant, task.id) for _ in range(2)]
    assert (running.task.state, ended.task.state) == (State.RUNNING, State.SUCCEEDED)
    assert running.task.metadata == ended.task.metadata == task.metadata
    assert ended.task.artifacts
    assert ended.age_seconds < 5


async def test_end_recorded_during_the_query_wins(gateway: FakeGateway) -> None:
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=0)
    await follow.read(gateway.tenant, task.id)
    gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.RUNNING))
    gateway.upstream.may_respond.clear()
    gateway.ledger.is_unavailable = True
    reading = asyncio.create_task(follow.read(gateway.tenant, task.id))
    await wait_until(lambda: bool(gateway.upstream.checks))
    ended = msgspec.structs.replace(task, state=State.SUCCEEDED, version=2)
    gateway.ledger.cache.put(ended, gateway.ledger.clock.now_ms)
    gateway.upstream.may_respond.set()
    assert (await reading).task is ended


@pytest.mark.parametrize("ends", [True, False])
async def test_task_lost_during_the_wait_still_ends(gateway: FakeGateway, ends: bool) -> None:
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=0)
    wait = asyncio.create_task(follow.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS))
    changes = follow.stream_changes(gateway.tenant, task.id, after_version=1, max_seconds=LONG_SECONDS)
    assert await anext(changes) is None
    stream = asyncio.create_task(anext(changes))
    await wait_until(lambda: gateway.ledger.cache.subscription_count == 2)
    ledger = gateway.ledger
    for kept in (ledger.tasks, ledger.reservations, ledger.due_checks, ledger.tenants):
        kept.clear()
    if not ends:
        gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.RUNNING))
    async with run_touching(follow):
        await wait_until(lambda: task.reservation in ledger.tasks)
        if not ends:
            await advance_interval(gateway)
        async with asyncio.timeout(20):
            results = await asyncio.gather(wait, stream)
    assert [item and item.task.state for item in results] == [State.SUCCEEDED] * 2
    assert gateway.task_counts == (1, 0, 0)
    await changes.aclose()
    assert follow._subscribed == {}
