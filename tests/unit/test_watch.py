"""Every running task is checked until it has ended, whatever happens to one check or one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.crypto import Keyring
from service.domain.tasks import State, Task, TaskIds
from service.usecases import background, poller
from service.usecases.ports import Answered, Check
from tests.unit.over_fakes import AWAY, Gateway, until

CRASH = RuntimeError("a fault of ours")


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    """The use cases, with a watch that never pauses."""
    monkeypatch.setattr(poller, "EXPIRE_SECONDS", 0)
    monkeypatch.setattr(background, "TICK_SECONDS", 0)
    monkeypatch.setattr(background, "AWAY_SECONDS", 0)
    return Gateway()


async def due(gateway: Gateway, number: int = 1) -> list[Task]:
    """So many tasks whose check is due."""
    tasks = [(await gateway.submitted()).task for _ in range(number)]
    gateway.ledger.clock.at += gateway.ledger.spans.check_after
    return tasks


def states(gateway: Gateway) -> list[State]:
    """The states of all tasks."""
    return [task.state for task in gateway.ledger.tasks.values()]


@asynccontextmanager
async def watching(gateway: Gateway) -> AsyncIterator[asyncio.Task[None]]:
    """A watch that goes on."""
    running = asyncio.create_task(gateway.watch.run())
    try:
        yield running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("fault", [AWAY, CRASH])
async def test_goes_on(gateway: Gateway, fault: Exception) -> None:
    """Neither a store that is away nor a fault of the watch's own ends it."""
    gateway.ledger.before["claim"] = [fault, fault]
    await due(gateway)
    async with watching(gateway):
        await until(lambda: states(gateway) == [State.SUCCEEDED])


@pytest.mark.parametrize("fault", [AWAY, CRASH])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_unrecorded_answer(gateway: Gateway, fault: Exception, when: str) -> None:
    """A check that could not be recorded is made again when its claim runs out, and its end is booked once."""
    getattr(gateway.ledger, when)["record"] = [fault]
    await due(gateway)
    await gateway.watch.tick()
    await gateway.watch.settled()
    gateway.ledger.clock.at += gateway.ledger.spans.claim
    await gateway.watch.tick()
    await gateway.watch.settled()
    assert states(gateway) == [State.SUCCEEDED]
    assert gateway.places == (1, 0, 0)


async def test_crashed_check(gateway: Gateway) -> None:
    """A check that crashes disturbs no other, and is made again when its claim runs out."""
    await due(gateway, 2)
    gateway.upstream.faults.append(CRASH)
    await gateway.watch.tick()
    await gateway.watch.settled()
    assert sorted(states(gateway)) == [State.QUEUED, State.SUCCEEDED]
    gateway.ledger.clock.at += gateway.ledger.spans.claim
    await gateway.watch.tick()
    await gateway.watch.settled()
    assert states(gateway) == [State.SUCCEEDED] * 2


async def test_at_once(gateway: Gateway) -> None:
    """No more than so many checks are under way at once, and the others follow."""
    await due(gateway, 5)
    gateway.upstream.go.clear()
    async with watching(gateway):
        await until(lambda: len(gateway.upstream.checks) == 2)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(gateway.upstream.checks) == 2
        gateway.upstream.go.set()
        await until(lambda: states(gateway) == [State.SUCCEEDED] * 5)


async def test_ends_at_once(gateway: Gateway) -> None:
    """A watch that is ended waits for no check; another process takes the task over when the claim runs out."""
    await due(gateway)
    gateway.upstream.go.clear()
    async with watching(gateway):
        await until(lambda: bool(gateway.upstream.checks))
    assert states(gateway) == [State.QUEUED]
    gateway.upstream.go.set()
    await gateway.watch.settled()
    gateway.ledger.clock.at += gateway.ledger.spans.claim - 1
    assert await gateway.ledger.claim(10) == []
    gateway.ledger.clock.at += 1
    await gateway.watch.tick()
    await gateway.watch.settled()
    assert states(gateway) == [State.SUCCEEDED]


async def test_before_the_registry_is_there(gateway: Gateway) -> None:
    """Nothing is claimed by a process that does not know the accounts yet."""
    gateway.registry.ready = False
    await due(gateway)
    await gateway.watch.tick()
    await gateway.watch.settled()
    assert states(gateway) == [State.QUEUED]
    gateway.registry.ready = True
    await gateway.watch.tick()
    await gateway.watch.settled()
    assert states(gateway) == [State.SUCCEEDED]


async def test_removed_account(gateway: Gateway) -> None:
    """A task whose account was removed ends as lost after long enough, and frees its place."""
    (task,) = await due(gateway)
    gateway.forget_accounts()
    for _ in range(3):
        await gateway.watch.tick()
        await gateway.watch.settled()
        gateway.ledger.clock.at += gateway.ledger.spans.lost_after
    ended = gateway.ledger.tasks[task.reservation]
    assert (ended.state, ended.error and ended.error.code) == (State.FAILED, "task-lost")
    assert gateway.places == (1, 0, 0)
    assert gateway.upstream.checks == []


async def test_missing_key(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose id can't be opened, since its key was taken away, waits for the key and is not given up."""
    (task,) = await due(gateway)
    with monkeypatch.context() as patched:
        patched.setattr(gateway.task_ids, "open", TaskIds(Keyring([b"x" * 32]).purpose("task-id")).open)
        for misses in (1, 2, 3):
            await gateway.watch.tick()
            await gateway.watch.settled()
            again = gateway.ledger.clock.at + (gateway.ledger.spans.check_after << misses)
            assert gateway.ledger.due[task.reservation] == again
            gateway.ledger.clock.at += gateway.ledger.spans.lost_after
    assert states(gateway) == [State.QUEUED]
    await gateway.watch.tick()
    await gateway.watch.settled()
    assert states(gateway) == [State.SUCCEEDED]


async def test_still_running(gateway: Gateway) -> None:
    """A task that still runs is due again after the interval."""
    gateway.upstream.next_checks.append(Check(answered=Answered.RUNNING))
    await due(gateway)
    await gateway.watch.tick()
    await gateway.watch.settled()
    assert states(gateway) == [State.RUNNING]
    gateway.ledger.clock.at += gateway.ledger.spans.check_after
    await gateway.watch.tick()
    await gateway.watch.settled()
    assert states(gateway) == [State.SUCCEEDED]


async def test_expiry_goes_on(gateway: Gateway) -> None:
    """Places that dead processes held are given back, also after the store was away and after a fault of our own."""
    gateway.upstream.go.clear()
    caller = asyncio.create_task(gateway.submitted())
    await until(lambda: bool(gateway.upstream.submits))
    gateway.ledger.clock.at += gateway.ledger.spans.lease
    gateway.ledger.before["expire"] = [AWAY, CRASH]
    expiring = asyncio.create_task(gateway.watch.expire())
    await until(lambda: gateway.places == (1, 0, 0))
    expiring.cancel()
    gateway.upstream.go.set()
    assert (await caller).task.reservation in gateway.ledger.tasks
    assert gateway.places == (1, 0, 1)


async def checked(gateway: Gateway, *answers: Answered, every: int) -> None:
    """Check the only task so many times, at such a distance of milliseconds."""
    for answered in answers:
        gateway.ledger.clock.at += every
        gateway.upstream.next_checks.append(Check(answered=answered))
        await gateway.watch.tick()
        await gateway.watch.settled()


@pytest.mark.parametrize("also", [Answered.UNUSABLE, Answered.SILENT])
async def test_unusable_answers(gateway: Gateway, also: Answered) -> None:
    """A task of which nothing usable is told ends after long enough and frees its place, even with silence between."""
    (task,) = await due(gateway)
    every = gateway.ledger.spans.unusable_after // 6
    await checked(gateway, *[Answered.UNUSABLE, also] * 3, every=every)
    assert states(gateway) == [State.QUEUED]
    await checked(gateway, Answered.UNUSABLE, every=every)
    ended = gateway.ledger.tasks[task.reservation]
    assert (ended.state, ended.error and ended.error.code) == (State.FAILED, "result-unusable")
    assert gateway.places == (1, 0, 0)


@pytest.mark.parametrize("between", [Answered.RUNNING, Answered.NOTHING])
async def test_answers_between_unusable_ones(gateway: Gateway, between: Answered) -> None:
    """Neither time without an answer nor what was before a good one counts against a task."""
    await due(gateway)
    half = gateway.ledger.spans.unusable_after // 2
    await checked(gateway, Answered.UNUSABLE, Answered.UNUSABLE, between, Answered.UNUSABLE, every=half)
    assert not any(state.ended for state in states(gateway))
    await checked(gateway, Answered.UNUSABLE, every=half)
    assert states(gateway) == [State.RUNNING if between is Answered.RUNNING else State.FAILED]
