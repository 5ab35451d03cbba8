"""However many wait, they cost the store and the upstream no more than one, and miss nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest

from service.domain.errors import UpstreamUnavailable
from service.domain.tasks import State, Task
from service.usecases import task_cache
from service.usecases.ports import CheckOutcome, CheckResult
from service.usecases.task_status import TaskReader
from tests.unit.fake_gateway import FakeGateway, wait_until

READER_COUNT = 2_000
LONG_SECONDS = 1e6
"""Seconds that no test waits for."""


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> FakeGateway:
    """The use cases over the ports in memory, of a process that remembers no running task."""
    monkeypatch.setattr(task_cache, "RUNNING_TTL_SECONDS", -1)
    return FakeGateway()


@pytest.fixture
def attended(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Every read of the store, which takes a moment."""
    calls: list[Sequence[str]] = []
    attend = gateway.ledger.touch

    async def noted(reservations: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        calls.append(reservations)
        await asyncio.sleep(0)
        return await attend(reservations)

    monkeypatch.setattr(gateway.ledger, "touch", noted)
    return calls


async def advance_interval(gateway: FakeGateway) -> None:
    """Let one interval pass, and everything be checked that is due then."""
    gateway.ledger.clock.now_ms += gateway.ledger.retention.check_interval_ms
    while await gateway.poller.start_due():
        pass
    await gateway.poller.wait_idle()


async def test_a_crowd(gateway: FakeGateway, attended: list[Sequence[str]]) -> None:
    """A crowd that waits for one task costs one read, and one check for each interval; each is told the end."""
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=LONG_SECONDS)
    gateway.upstream.next_checks += [CheckResult(outcome=CheckOutcome.RUNNING)] * 2
    waits = [
        asyncio.create_task(follow.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS))
        for _ in range(READER_COUNT)
    ]
    await wait_until(lambda: gateway.ledger.cache.subscription_count == READER_COUNT)
    for _ in range(3):
        await advance_interval(gateway)
    seen = await asyncio.gather(*waits)
    assert {each.task.state for each in seen} == {State.SUCCEEDED}
    assert len(gateway.upstream.checks) == 3
    assert attended == [[task.reservation]]


async def test_each_leaves_by_itself(gateway: FakeGateway, attended: list[Sequence[str]]) -> None:
    """Of those who share one read, one may leave, and the others are answered."""
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=LONG_SECONDS)
    first, second = (asyncio.create_task(follow.read(gateway.tenant, task.id)) for _ in range(2))
    await wait_until(lambda: bool(attended))
    first.cancel()
    assert (await second).task == task
    assert len(attended) == 1
    await follow.read(gateway.tenant, task.id)
    assert len(attended) == 2


async def test_a_change_during_the_read(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end that is recorded while the store is still being read wakes who waits for it."""
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=LONG_SECONDS)
    attend = gateway.ledger.touch

    async def overtaken(reservations: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        read = await attend(reservations)
        await advance_interval(gateway)
        return read

    monkeypatch.setattr(gateway.ledger, "touch", overtaken)
    async with asyncio.timeout(20):
        seen = await follow.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS)
    assert seen.task.state is State.SUCCEEDED


async def test_never_back(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has heard of a version shows none before it, even if the store does."""
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
    """A process that looks after those who wait."""
    looking = asyncio.create_task(follow.touch_watched())
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


async def test_what_was_not_announced(gateway: FakeGateway, attended: list[Sequence[str]]) -> None:
    """An end of which the announcement was lost is found at the next look; a store that is away does not end that."""
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=0)
    wait = asyncio.create_task(follow.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS))
    await wait_until(lambda: gateway.ledger.cache.subscription_count == 1 and len(attended) == 1)
    gateway.ledger.cache = gateway.poller._cache = task_cache.TaskCache(gateway.ledger.cache.durations)
    await advance_interval(gateway)
    gateway.ledger.is_unavailable = True
    async with run_touching(follow):
        await wait_until(lambda: len(attended) >= 4)
        assert not wait.done()
        gateway.ledger.is_unavailable = False
        assert (await wait).task.state is State.SUCCEEDED


async def test_only_who_waits(gateway: FakeGateway, attended: list[Sequence[str]]) -> None:
    """Only tasks that somebody waits for are looked after, many at a time."""
    tasks = [(await gateway.submit_image()).task for _ in range(150)]
    follow = gateway.make_reader(interval=0)
    for task in tasks[:5]:
        await follow.read(gateway.tenant, task.id)
    waits = [asyncio.create_task(follow.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS)) for task in tasks[5:]]
    await wait_until(lambda: len(attended) == len(tasks))
    attended.clear()
    async with run_touching(follow):
        await wait_until(lambda: len(attended) >= 2)
    assert sorted(name for batch in attended[:2] for name in batch) == sorted(t.reservation for t in tasks[5:])
    gateway.ledger.cache.close()
    await asyncio.gather(*waits)


async def test_nobody_can_tell(gateway: FakeGateway) -> None:
    """Who would wait for a task that neither the store nor the upstream tells of is told so, and does not wait."""
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=LONG_SECONDS)
    gateway.ledger.is_unavailable = True
    gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.NO_RESPONSE))
    with pytest.raises(UpstreamUnavailable):
        await follow.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS)
    assert gateway.ledger.cache.subscription_count == 0


async def test_looked_up_while_the_store_is_away(gateway: FakeGateway) -> None:
    """What the upstream tells while the store is away is shown with all that was known of the task before."""
    task, follow = (await gateway.submit_image()).task, gateway.make_reader(interval=0)
    await follow.read(gateway.tenant, task.id)
    gateway.ledger.is_unavailable = True
    gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.RUNNING))
    running, ended = [await follow.read(gateway.tenant, task.id) for _ in range(2)]
    assert (running.task.state, ended.task.state) == (State.RUNNING, State.SUCCEEDED)
    assert running.task.metadata == ended.task.metadata == task.metadata
    assert ended.task.artifacts
    assert ended.age_seconds < 5


async def test_recorded_while_it_was_looked_up(gateway: FakeGateway) -> None:
    """An end that is recorded while the upstream is asked is shown, not what the upstream said of the task before."""
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
async def test_lost_while_it_is_waited_for(gateway: FakeGateway, ends: bool) -> None:
    """Who waits for a task that the store loses in the meantime sees its end, be it there already or yet to come."""
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
            seen = await asyncio.gather(wait, stream)
    assert [each and each.task.state for each in seen] == [State.SUCCEEDED] * 2
    assert gateway.task_counts == (1, 0, 0)
    await changes.aclose()
    assert follow._subscribed == {}
