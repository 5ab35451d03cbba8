"""A task that was paid for can be read, whatever has become of the ledger."""

from __future__ import annotations

import asyncio
import copy

import pytest

from service.domain.errors import NotFound, UpstreamUnavailable
from service.domain.ledger import ReservationState
from service.domain.tasks import State, Task
from service.usecases import task_cache, task_status
from service.usecases.ports import CheckOutcome, CheckResult
from service.usecases.task_status import MAX_RECREATE_AGE_SECONDS
from tests.unit.fake_gateway import UNAVAILABLE, FakeGateway, wait_until

NEVER_SECONDS = 1e9
"""An interval that does not end."""


@pytest.fixture
def gateway() -> FakeGateway:
    """The use cases over the ports in memory."""
    return FakeGateway()


async def submit_task(gateway: FakeGateway, *, lost: bool = False) -> Task:
    """A task, which the ledger may have lost together with everything else."""
    task = (await gateway.submit_image()).task
    if lost:
        for kept in (
            gateway.ledger.tasks,
            gateway.ledger.reservations,
            gateway.ledger.due_checks,
            gateway.ledger.tenants,
        ):
            kept.clear()
    return task


async def test_one_look_up_per_interval(gateway: FakeGateway) -> None:
    """While the ledger is away all reads of one interval share one look-up at the upstream."""
    task, reads = await submit_task(gateway), gateway.make_reader(interval=NEVER_SECONDS)
    gateway.ledger.is_unavailable = True
    seen = await asyncio.gather(*(reads.read(gateway.tenant, task.id) for _ in range(5)))
    seen.append(await reads.read(gateway.tenant, task.id))
    assert {each.task.state for each in seen} == {State.SUCCEEDED}
    assert all(each.task.artifacts and each.age_seconds < 5 for each in seen)
    assert len(gateway.upstream.checks) == 1


async def test_next_interval(gateway: FakeGateway) -> None:
    """When the interval is over the upstream is asked anew."""
    task, reads = await submit_task(gateway), gateway.make_reader(interval=0)
    gateway.ledger.is_unavailable = True
    gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.RUNNING))
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.RUNNING
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED


async def test_slow_look_up(gateway: FakeGateway) -> None:
    """A look-up that takes longer than the interval is waited for, not made again, and outlives who asked."""
    task, reads = await submit_task(gateway), gateway.make_reader(interval=0)
    gateway.ledger.is_unavailable = True
    gateway.upstream.may_respond.clear()
    first, second = (asyncio.create_task(reads.read(gateway.tenant, task.id)) for _ in range(2))
    await wait_until(lambda: bool(gateway.upstream.checks))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    gateway.upstream.may_respond.set()
    assert (await second).task.state is State.SUCCEEDED
    assert len(gateway.upstream.checks) == 1


@pytest.mark.parametrize("answered", [CheckOutcome.NOT_FOUND, CheckOutcome.NO_RESPONSE])
async def test_nobody_can_tell(gateway: FakeGateway, answered: CheckOutcome) -> None:
    """Where neither the ledger nor the upstream can tell of a task, the answer is to try again, not that it is gone."""
    task, reads = await submit_task(gateway), gateway.make_reader(interval=2.5)
    gateway.ledger.is_unavailable = True
    gateway.upstream.next_checks.append(CheckResult(outcome=answered))
    with pytest.raises(UpstreamUnavailable) as told:
        await reads.read(gateway.tenant, task.id)
    assert told.value.retry_after == 2.5


async def test_lost_by_both(gateway: FakeGateway) -> None:
    """A task that the ledger lost and the upstream does not know is not found, and nothing is booked."""
    task, reads = await submit_task(gateway, lost=True), gateway.make_reader(interval=0)
    gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.NOT_FOUND))
    with pytest.raises(NotFound):
        await reads.read(gateway.tenant, task.id)
    assert gateway.ledger.tasks == {}


async def test_booked_again(gateway: FakeGateway) -> None:
    """A task that the ledger lost is booked once when it is read, and watched until its end."""
    task, reads = await submit_task(gateway, lost=True), gateway.make_reader(interval=0)
    gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.RUNNING))
    seen = await asyncio.gather(*(reads.read(gateway.tenant, task.id) for _ in range(3)))
    assert [each.task.id for each in seen] == [task.id] * 3
    assert gateway.task_counts == (1, 0, 1)
    gateway.ledger.clock.now_ms += gateway.ledger.retention.check_interval_ms
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert gateway.task_counts == (1, 0, 0)


async def test_read_settles_what_a_dead_process_left(gateway: FakeGateway) -> None:
    """The first read of an accepted task whose process died before it could book replaces the unknown outcome."""
    task, reads = await submit_task(gateway), gateway.make_reader(interval=0)
    gateway.ledger.tasks.clear()
    gateway.ledger.due_checks.clear()
    gateway.ledger.tenants.clear()
    gateway.ledger.reservations.clear()
    gateway.ledger.errors_before["settle"] = [UNAVAILABLE]
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert gateway.ledger.tasks == {}
    await reads.read(gateway.tenant, task.id)
    assert list(gateway.ledger.tasks) == [task.reservation]


async def test_sender_goes_first(gateway: FakeGateway) -> None:
    """While the sender may still book a task, with all it knows, a read shows it but does not book it."""
    task, reads = await submit_task(gateway), gateway.make_reader(interval=0)
    reservation = gateway.ledger.reservations[task.reservation]
    gateway.ledger.tasks.clear()
    reservation.state = ReservationState.RESERVED
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert gateway.ledger.tasks == {}
    gateway.ledger.clock.now_ms = reservation.lease_expires_at
    await reads.read(gateway.tenant, task.id)
    assert list(gateway.ledger.tasks) == [task.reservation]


async def test_too_old_to_be_booked(gateway: FakeGateway) -> None:
    """A task as old as what the ledger forgets by itself is shown, but not booked a second time."""
    task, reads = await submit_task(gateway, lost=True), gateway.make_reader(interval=0)
    gateway.ledger.clock.now_ms += MAX_RECREATE_AGE_SECONDS * 1000
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert gateway.ledger.tasks == {}


async def test_removed_account(gateway: FakeGateway) -> None:
    """A lost task whose account was removed can't be asked about any more."""
    task, reads = await submit_task(gateway, lost=True), gateway.make_reader(interval=0)
    gateway.remove_accounts()
    with pytest.raises(NotFound):
        await reads.read(gateway.tenant, task.id)
    assert gateway.upstream.checks == []


async def test_bounded_memory(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many look-ups are remembered, the latest ones."""
    monkeypatch.setattr(task_status, "_MAX_QUERIES", 2)
    tasks = [await submit_task(gateway) for _ in range(3)]
    reads = gateway.make_reader(interval=NEVER_SECONDS)
    gateway.ledger.is_unavailable = True
    for task in tasks:
        await reads.read(gateway.tenant, task.id)
    await reads.read(gateway.tenant, tasks[2].id)
    assert len(gateway.upstream.checks) == 3
    await reads.read(gateway.tenant, tasks[0].id)
    assert len(gateway.upstream.checks) == 4


async def forget_tasks(gateway: FakeGateway) -> None:
    """Let the ledger lose all that it knows of tasks."""
    for kept in (gateway.ledger.tasks, gateway.ledger.reservations, gateway.ledger.due_checks, gateway.ledger.tenants):
        kept.clear()


async def finish_task(gateway: FakeGateway, reads: task_status.TaskReader) -> Task:
    """A task that has ended, as a process has it in its memory."""
    task = (await gateway.submit_image()).task
    gateway.ledger.clock.now_ms += gateway.ledger.retention.check_interval_ms
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    seen = await reads.read(gateway.tenant, task.id)
    assert seen.task.state is State.SUCCEEDED
    return seen.task


async def test_booked_again_though_it_is_remembered(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first read of a task that the ledger lost books it and its end, though the process remembers the end."""
    monkeypatch.setattr(task_cache, "FINISHED_TTL_SECONDS", -1)
    reads = gateway.make_reader(interval=NEVER_SECONDS)
    task = await finish_task(gateway, reads)
    await forget_tasks(gateway)
    assert (await reads.read(gateway.tenant, task.id)).task == task
    await wait_until(lambda: not reads._verifications)
    assert gateway.ledger.tasks[task.reservation].state is State.SUCCEEDED
    assert gateway.ledger.reservations[task.reservation].cost
    assert gateway.task_counts == (1, 0, 0)


async def test_end_that_an_older_store_does_not_know(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end that the process remembers stays shown, and is recorded, after a restore of data from before it."""
    monkeypatch.setattr(task_cache, "FINISHED_TTL_SECONDS", -1)
    reads = gateway.make_reader(interval=NEVER_SECONDS)
    task = (await gateway.submit_image()).task
    before = copy.deepcopy((gateway.ledger.tasks, gateway.ledger.reservations, gateway.ledger.due_checks))
    gateway.ledger.clock.now_ms += gateway.ledger.retention.check_interval_ms
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    gateway.ledger.tasks, gateway.ledger.reservations, gateway.ledger.due_checks = before
    for _ in range(2):
        assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
        await wait_until(lambda: not reads._verifications)
    assert gateway.ledger.tasks[task.reservation].state is State.SUCCEEDED


async def test_end_is_recorded_before_it_is_shown(gateway: FakeGateway) -> None:
    """Once a process has shown the end of a lost task, no other process shows it as running."""
    task, reads, others = (
        await submit_task(gateway, lost=True),
        gateway.make_reader(interval=0),
        gateway.make_reader(interval=0),
    )
    others._cache = task_cache.TaskCache(gateway.ledger.cache.durations)
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert (await others.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert len(gateway.upstream.checks) == 1


async def test_end_shown_while_the_ledger_was_away(gateway: FakeGateway) -> None:
    """An end that the upstream told while the ledger was away stays shown once that is back, and is recorded."""
    task, reads = await submit_task(gateway), gateway.make_reader(interval=0)
    gateway.ledger.is_unavailable = True
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    gateway.ledger.is_unavailable = False
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    await wait_until(lambda: not reads._verifications)
    assert gateway.ledger.tasks[task.reservation].state is State.SUCCEEDED
