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
from service.usecases.ports import Answered, Check
from service.usecases.task_status import Follow
from tests.unit.over_fakes import Gateway, until

CROWD = 2_000
LONG = 1e6
"""Seconds that no test waits for."""


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    """The use cases over the ports in memory, of a process that remembers no running task."""
    monkeypatch.setattr(task_cache, "RUNNING_SECONDS", -1)
    return Gateway()


@pytest.fixture
def attended(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Every read of the store, which takes a moment."""
    calls: list[Sequence[str]] = []
    attend = gateway.ledger.attend

    async def noted(reservations: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        calls.append(reservations)
        await asyncio.sleep(0)
        return await attend(reservations)

    monkeypatch.setattr(gateway.ledger, "attend", noted)
    return calls


async def interval(gateway: Gateway) -> None:
    """Let one interval pass, and everything be checked that is due then."""
    gateway.ledger.clock.at += gateway.ledger.spans.check_after
    while await gateway.watch.tick():
        pass
    await gateway.watch.settled()


async def test_a_crowd(gateway: Gateway, attended: list[Sequence[str]]) -> None:
    """A crowd that waits for one task costs one read, and one check for each interval; each is told the end."""
    task, follow = (await gateway.submitted()).task, gateway.follow(interval=LONG)
    gateway.upstream.next_checks += [Check(answered=Answered.RUNNING)] * 2
    waits = [asyncio.create_task(follow.read(gateway.tenant, task.id, wait=LONG)) for _ in range(CROWD)]
    await until(lambda: gateway.ledger.board.waiting == CROWD)
    for _ in range(3):
        await interval(gateway)
    seen = await asyncio.gather(*waits)
    assert {each.task.state for each in seen} == {State.SUCCEEDED}
    assert len(gateway.upstream.checks) == 3
    assert attended == [[task.reservation]]


async def test_each_leaves_by_itself(gateway: Gateway, attended: list[Sequence[str]]) -> None:
    """Of those who share one read, one may leave, and the others are answered."""
    task, follow = (await gateway.submitted()).task, gateway.follow(interval=LONG)
    first, second = (asyncio.create_task(follow.read(gateway.tenant, task.id)) for _ in range(2))
    await until(lambda: bool(attended))
    first.cancel()
    assert (await second).task == task
    assert len(attended) == 1
    await follow.read(gateway.tenant, task.id)
    assert len(attended) == 2


async def test_a_change_during_the_read(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end that is recorded while the store is still being read wakes who waits for it."""
    task, follow = (await gateway.submitted()).task, gateway.follow(interval=LONG)
    attend = gateway.ledger.attend

    async def overtaken(reservations: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        read = await attend(reservations)
        await interval(gateway)
        return read

    monkeypatch.setattr(gateway.ledger, "attend", overtaken)
    async with asyncio.timeout(20):
        seen = await follow.read(gateway.tenant, task.id, wait=LONG)
    assert seen.task.state is State.SUCCEEDED


async def test_never_back(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has heard of a version shows none before it, even if the store does."""
    task, follow = (await gateway.submitted()).task, gateway.follow(interval=LONG)
    before = await gateway.ledger.attend([task.reservation])
    gateway.upstream.next_checks.append(Check(answered=Answered.RUNNING))
    await follow.read(gateway.tenant, task.id)
    await interval(gateway)

    async def lagging(_: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        return before

    monkeypatch.setattr(gateway.ledger, "attend", lagging)
    assert (await follow.read(gateway.tenant, task.id)).task.state is State.RUNNING


@asynccontextmanager
async def attending(follow: Follow) -> AsyncIterator[None]:
    """A process that looks after those who wait."""
    looking = asyncio.create_task(follow.attend())
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


async def test_what_was_not_announced(gateway: Gateway, attended: list[Sequence[str]]) -> None:
    """An end of which the announcement was lost is found at the next look; a store that is away does not end that."""
    task, follow = (await gateway.submitted()).task, gateway.follow(interval=0)
    wait = asyncio.create_task(follow.read(gateway.tenant, task.id, wait=LONG))
    await until(lambda: gateway.ledger.board.waiting == 1 and len(attended) == 1)
    gateway.ledger.board = gateway.watch._board = task_cache.Board(gateway.ledger.board.pace)
    await interval(gateway)
    gateway.ledger.away = True
    async with attending(follow):
        await until(lambda: len(attended) >= 4)
        assert not wait.done()
        gateway.ledger.away = False
        assert (await wait).task.state is State.SUCCEEDED


async def test_only_who_waits(gateway: Gateway, attended: list[Sequence[str]]) -> None:
    """Only tasks that somebody waits for are looked after, many at a time."""
    tasks = [(await gateway.submitted()).task for _ in range(150)]
    follow = gateway.follow(interval=0)
    for task in tasks[:5]:
        await follow.read(gateway.tenant, task.id)
    waits = [asyncio.create_task(follow.read(gateway.tenant, task.id, wait=LONG)) for task in tasks[5:]]
    await until(lambda: len(attended) == len(tasks))
    attended.clear()
    async with attending(follow):
        await until(lambda: len(attended) >= 2)
    assert sorted(name for batch in attended[:2] for name in batch) == sorted(t.reservation for t in tasks[5:])
    gateway.ledger.board.close()
    await asyncio.gather(*waits)


async def test_nobody_can_tell(gateway: Gateway) -> None:
    """Who would wait for a task that neither the store nor the upstream tells of is told so, and does not wait."""
    task, follow = (await gateway.submitted()).task, gateway.follow(interval=LONG)
    gateway.ledger.away = True
    gateway.upstream.next_checks.append(Check(answered=Answered.NOTHING))
    with pytest.raises(UpstreamUnavailable):
        await follow.read(gateway.tenant, task.id, wait=LONG)
    assert gateway.ledger.board.waiting == 0


async def test_looked_up_while_the_store_is_away(gateway: Gateway) -> None:
    """What the upstream tells while the store is away is shown with all that was known of the task before."""
    task, follow = (await gateway.submitted()).task, gateway.follow(interval=0)
    await follow.read(gateway.tenant, task.id)
    gateway.ledger.away = True
    gateway.upstream.next_checks.append(Check(answered=Answered.RUNNING))
    running, ended = [await follow.read(gateway.tenant, task.id) for _ in range(2)]
    assert (running.task.state, ended.task.state) == (State.RUNNING, State.SUCCEEDED)
    assert running.task.metadata == ended.task.metadata == task.metadata
    assert ended.task.artifacts
    assert ended.age < 5


async def test_recorded_while_it_was_looked_up(gateway: Gateway) -> None:
    """An end that is recorded while the upstream is asked is shown, not what the upstream said of the task before."""
    task, follow = (await gateway.submitted()).task, gateway.follow(interval=0)
    await follow.read(gateway.tenant, task.id)
    gateway.upstream.next_checks.append(Check(answered=Answered.RUNNING))
    gateway.upstream.go.clear()
    gateway.ledger.away = True
    reading = asyncio.create_task(follow.read(gateway.tenant, task.id))
    await until(lambda: bool(gateway.upstream.checks))
    ended = msgspec.structs.replace(task, state=State.SUCCEEDED, version=2)
    gateway.ledger.board.post(ended, gateway.ledger.clock.at)
    gateway.upstream.go.set()
    assert (await reading).task is ended


@pytest.mark.parametrize("ends", [True, False])
async def test_lost_while_it_is_waited_for(gateway: Gateway, ends: bool) -> None:
    """Who waits for a task that the store loses in the meantime sees its end, be it there already or yet to come."""
    task, follow = (await gateway.submitted()).task, gateway.follow(interval=0)
    wait = asyncio.create_task(follow.read(gateway.tenant, task.id, wait=LONG))
    changes = follow.changes(gateway.tenant, task.id, after=1, seconds=LONG)
    assert await anext(changes) is None
    stream = asyncio.create_task(anext(changes))
    await until(lambda: gateway.ledger.board.waiting == 2)
    ledger = gateway.ledger
    for kept in (ledger.tasks, ledger.reservations, ledger.due, ledger.tenants):
        kept.clear()
    if not ends:
        gateway.upstream.next_checks.append(Check(answered=Answered.RUNNING))
    async with attending(follow):
        await until(lambda: task.reservation in ledger.tasks)
        if not ends:
            await interval(gateway)
        async with asyncio.timeout(20):
            seen = await asyncio.gather(wait, stream)
    assert [each and each.task.state for each in seen] == [State.SUCCEEDED] * 2
    assert gateway.places == (1, 0, 0)
    await changes.aclose()
    assert follow._watched == {}
