"""A task that was paid for can be read, whatever has become of the ledger."""

from __future__ import annotations

import asyncio
import copy

import pytest

from service.domain.errors import NotFound, UpstreamUnavailable
from service.domain.ledger import ReservationState
from service.domain.tasks import State, Task
from service.usecases import task_cache, task_status
from service.usecases.ports import Answered, Check
from service.usecases.task_status import BOOKED_WITHIN_SECONDS
from tests.unit.over_fakes import AWAY, Gateway, until

NEVER = 1e9
"""An interval that does not end."""


@pytest.fixture
def gateway() -> Gateway:
    """The use cases over the ports in memory."""
    return Gateway()


async def paid(gateway: Gateway, *, lost: bool = False) -> Task:
    """A task, which the ledger may have lost together with everything else."""
    task = (await gateway.submitted()).task
    if lost:
        for kept in (gateway.ledger.tasks, gateway.ledger.reservations, gateway.ledger.due, gateway.ledger.tenants):
            kept.clear()
    return task


async def test_one_look_up_per_interval(gateway: Gateway) -> None:
    """While the ledger is away all reads of one interval share one look-up at the upstream."""
    task, reads = await paid(gateway), gateway.follow(interval=NEVER)
    gateway.ledger.away = True
    seen = await asyncio.gather(*(reads.read(gateway.tenant, task.id) for _ in range(5)))
    seen.append(await reads.read(gateway.tenant, task.id))
    assert {each.task.state for each in seen} == {State.SUCCEEDED}
    assert all(each.task.artifacts and each.age < 5 for each in seen)
    assert len(gateway.upstream.checks) == 1


async def test_next_interval(gateway: Gateway) -> None:
    """When the interval is over the upstream is asked anew."""
    task, reads = await paid(gateway), gateway.follow(interval=0)
    gateway.ledger.away = True
    gateway.upstream.next_checks.append(Check(answered=Answered.RUNNING))
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.RUNNING
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED


async def test_slow_look_up(gateway: Gateway) -> None:
    """A look-up that takes longer than the interval is waited for, not made again, and outlives who asked."""
    task, reads = await paid(gateway), gateway.follow(interval=0)
    gateway.ledger.away = True
    gateway.upstream.go.clear()
    first, second = (asyncio.create_task(reads.read(gateway.tenant, task.id)) for _ in range(2))
    await until(lambda: bool(gateway.upstream.checks))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    gateway.upstream.go.set()
    assert (await second).task.state is State.SUCCEEDED
    assert len(gateway.upstream.checks) == 1


@pytest.mark.parametrize("answered", [Answered.SILENT, Answered.NOTHING])
async def test_nobody_can_tell(gateway: Gateway, answered: Answered) -> None:
    """Where neither the ledger nor the upstream can tell of a task, the answer is to try again, not that it is gone."""
    task, reads = await paid(gateway), gateway.follow(interval=2.5)
    gateway.ledger.away = True
    gateway.upstream.next_checks.append(Check(answered=answered))
    with pytest.raises(UpstreamUnavailable) as told:
        await reads.read(gateway.tenant, task.id)
    assert told.value.retry_after == 2.5


async def test_lost_by_both(gateway: Gateway) -> None:
    """A task that the ledger lost and the upstream does not know is not found, and nothing is booked."""
    task, reads = await paid(gateway, lost=True), gateway.follow(interval=0)
    gateway.upstream.next_checks.append(Check(answered=Answered.SILENT))
    with pytest.raises(NotFound):
        await reads.read(gateway.tenant, task.id)
    assert gateway.ledger.tasks == {}


async def test_booked_again(gateway: Gateway) -> None:
    """A task that the ledger lost is booked once when it is read, and watched until its end."""
    task, reads = await paid(gateway, lost=True), gateway.follow(interval=0)
    gateway.upstream.next_checks.append(Check(answered=Answered.RUNNING))
    seen = await asyncio.gather(*(reads.read(gateway.tenant, task.id) for _ in range(3)))
    assert [each.task.id for each in seen] == [task.id] * 3
    assert gateway.places == (1, 0, 1)
    gateway.ledger.clock.at += gateway.ledger.spans.check_after
    await gateway.watch.tick()
    await gateway.watch.settled()
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert gateway.places == (1, 0, 0)


async def test_read_settles_what_a_dead_process_left(gateway: Gateway) -> None:
    """The first read of an accepted task whose process died before it could book replaces the unknown outcome."""
    task, reads = await paid(gateway), gateway.follow(interval=0)
    gateway.ledger.tasks.clear()
    gateway.ledger.due.clear()
    gateway.ledger.tenants.clear()
    gateway.ledger.reservations.clear()
    gateway.ledger.before["settle"] = [AWAY]
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert gateway.ledger.tasks == {}
    await reads.read(gateway.tenant, task.id)
    assert list(gateway.ledger.tasks) == [task.reservation]


async def test_sender_goes_first(gateway: Gateway) -> None:
    """While the sender may still book a task, with all it knows, a read shows it but does not book it."""
    task, reads = await paid(gateway), gateway.follow(interval=0)
    reservation = gateway.ledger.reservations[task.reservation]
    gateway.ledger.tasks.clear()
    reservation.state = ReservationState.RESERVED
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert gateway.ledger.tasks == {}
    gateway.ledger.clock.at = reservation.lease
    await reads.read(gateway.tenant, task.id)
    assert list(gateway.ledger.tasks) == [task.reservation]


async def test_too_old_to_be_booked(gateway: Gateway) -> None:
    """A task as old as what the ledger forgets by itself is shown, but not booked a second time."""
    task, reads = await paid(gateway, lost=True), gateway.follow(interval=0)
    gateway.ledger.clock.at += BOOKED_WITHIN_SECONDS * 1000
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert gateway.ledger.tasks == {}


async def test_removed_account(gateway: Gateway) -> None:
    """A lost task whose account was removed can't be asked about any more."""
    task, reads = await paid(gateway, lost=True), gateway.follow(interval=0)
    gateway.forget_accounts()
    with pytest.raises(NotFound):
        await reads.read(gateway.tenant, task.id)
    assert gateway.upstream.checks == []


async def test_bounded_memory(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many look-ups are remembered, the latest ones."""
    monkeypatch.setattr(task_status, "_REMEMBERED", 2)
    tasks = [await paid(gateway) for _ in range(3)]
    reads = gateway.follow(interval=NEVER)
    gateway.ledger.away = True
    for task in tasks:
        await reads.read(gateway.tenant, task.id)
    await reads.read(gateway.tenant, tasks[2].id)
    assert len(gateway.upstream.checks) == 3
    await reads.read(gateway.tenant, tasks[0].id)
    assert len(gateway.upstream.checks) == 4


async def lose(gateway: Gateway) -> None:
    """Let the ledger lose all that it knows of tasks."""
    for kept in (gateway.ledger.tasks, gateway.ledger.reservations, gateway.ledger.due, gateway.ledger.tenants):
        kept.clear()


async def ended(gateway: Gateway, reads: task_status.Follow) -> Task:
    """A task that has ended, as a process has it in its memory."""
    task = (await gateway.submitted()).task
    gateway.ledger.clock.at += gateway.ledger.spans.check_after
    await gateway.watch.tick()
    await gateway.watch.settled()
    seen = await reads.read(gateway.tenant, task.id)
    assert seen.task.state is State.SUCCEEDED
    return seen.task


async def test_booked_again_though_it_is_remembered(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first read of a task that the ledger lost books it and its end, though the process remembers the end."""
    monkeypatch.setattr(task_cache, "VERIFIED_SECONDS", -1)
    reads = gateway.follow(interval=NEVER)
    task = await ended(gateway, reads)
    await lose(gateway)
    assert (await reads.read(gateway.tenant, task.id)).task == task
    await until(lambda: not reads._verifying)
    assert gateway.ledger.tasks[task.reservation].state is State.SUCCEEDED
    assert gateway.ledger.reservations[task.reservation].cost
    assert gateway.places == (1, 0, 0)


async def test_end_that_an_older_store_does_not_know(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end that the process remembers stays shown, and is recorded, after a restore of data from before it."""
    monkeypatch.setattr(task_cache, "VERIFIED_SECONDS", -1)
    reads = gateway.follow(interval=NEVER)
    task = (await gateway.submitted()).task
    before = copy.deepcopy((gateway.ledger.tasks, gateway.ledger.reservations, gateway.ledger.due))
    gateway.ledger.clock.at += gateway.ledger.spans.check_after
    await gateway.watch.tick()
    await gateway.watch.settled()
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    gateway.ledger.tasks, gateway.ledger.reservations, gateway.ledger.due = before
    for _ in range(2):
        assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
        await until(lambda: not reads._verifying)
    assert gateway.ledger.tasks[task.reservation].state is State.SUCCEEDED


async def test_end_is_recorded_before_it_is_shown(gateway: Gateway) -> None:
    """Once a process has shown the end of a lost task, no other process shows it as running."""
    task, reads, others = await paid(gateway, lost=True), gateway.follow(interval=0), gateway.follow(interval=0)
    others._board = task_cache.Board(gateway.ledger.board.pace)
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert (await others.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert len(gateway.upstream.checks) == 1


async def test_end_shown_while_the_ledger_was_away(gateway: Gateway) -> None:
    """An end that the upstream told while the ledger was away stays shown once that is back, and is recorded."""
    task, reads = await paid(gateway), gateway.follow(interval=0)
    gateway.ledger.away = True
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    gateway.ledger.away = False
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    await until(lambda: not reads._verifying)
    assert gateway.ledger.tasks[task.reservation].state is State.SUCCEEDED
