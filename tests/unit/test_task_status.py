"""Reading of tasks that the ledger lost or cannot be asked about."""

from __future__ import annotations

import asyncio
import copy

import pytest

from service.domain.errors import NotFound, UpstreamUnavailable
from service.domain.ledger import ReservationState
from service.domain.tasks import State, Task
from service.usecases import caches, task_status
from service.usecases.ports import CheckOutcome, CheckResult
from service.usecases.task_status import MAX_RECREATE_AGE_SECONDS
from tests.unit.fake_gateway import UNAVAILABLE, FakeGateway, wait_until

NEVER_SECONDS = 1e9
"""An interval that does not end within a test."""


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


async def submit_task(gateway: FakeGateway, *, lost: bool = False) -> Task:
    """Submit a task; `lost` deletes it from the ledger."""
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


async def test_one_upstream_query_per_interval(gateway: FakeGateway) -> None:
    task, reads = await submit_task(gateway), gateway.make_reader(interval=NEVER_SECONDS)
    gateway.ledger.is_unavailable = True
    results = await asyncio.gather(*(reads.read(gateway.tenant, task.id) for _ in range(5)))
    results.append(await reads.read(gateway.tenant, task.id))
    assert {item.task.state for item in results} == {State.SUCCEEDED}
    assert all(item.task.artifacts and item.age_seconds < 5 for item in results)
    assert len(gateway.upstream.checks) == 1


async def test_next_interval_queries_again(gateway: FakeGateway) -> None:
    task, reads = await submit_task(gateway), gateway.make_reader(interval=0)
    gateway.ledger.is_unavailable = True
    gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.RUNNING))
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.RUNNING
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED


async def test_slow_query_is_shared_and_outlives_its_caller(gateway: FakeGateway) -> None:
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
async def test_unavailable_ledger_and_upstream_is_503(gateway: FakeGateway, answered: CheckOutcome) -> None:
    task, reads = await submit_task(gateway), gateway.make_reader(interval=2.5)
    gateway.ledger.is_unavailable = True
    gateway.upstream.next_checks.append(CheckResult(outcome=answered))
    with pytest.raises(UpstreamUnavailable) as caught:
        await reads.read(gateway.tenant, task.id)
    assert caught.value.retry_after == 2.5


async def test_task_unknown_to_both_is_not_found(gateway: FakeGateway) -> None:
    task, reads = await submit_task(gateway, lost=True), gateway.make_reader(interval=0)
    gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.NOT_FOUND))
    with pytest.raises(NotFound):
        await reads.read(gateway.tenant, task.id)
    assert gateway.ledger.tasks == {}


async def test_lost_task_is_recreated_once(gateway: FakeGateway) -> None:
    task, reads = await submit_task(gateway, lost=True), gateway.make_reader(interval=0)
    gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.RUNNING))
    results = await asyncio.gather(*(reads.read(gateway.tenant, task.id) for _ in range(3)))
    assert [item.task.id for item in results] == [task.id] * 3
    assert gateway.task_counts == (1, 0, 1)
    gateway.ledger.clock.now_ms += gateway.ledger.retention.check_interval_ms
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert gateway.task_counts == (1, 0, 0)


async def test_read_settles_the_submission_of_a_dead_process(gateway: FakeGateway) -> None:
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


async def test_read_does_not_settle_before_the_sender(gateway: FakeGateway) -> None:
    task, reads = await submit_task(gateway), gateway.make_reader(interval=0)
    reservation = gateway.ledger.reservations[task.reservation]
    gateway.ledger.tasks.clear()
    reservation.state = ReservationState.RESERVED
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert gateway.ledger.tasks == {}
    gateway.ledger.clock.now_ms = reservation.lease_expires_at
    await reads.read(gateway.tenant, task.id)
    assert list(gateway.ledger.tasks) == [task.reservation]


async def test_expired_task_is_shown_but_not_recreated(gateway: FakeGateway) -> None:
    task, reads = await submit_task(gateway, lost=True), gateway.make_reader(interval=0)
    gateway.ledger.clock.now_ms += MAX_RECREATE_AGE_SECONDS * 1000
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert gateway.ledger.tasks == {}


async def test_lost_task_of_a_removed_account(gateway: FakeGateway) -> None:
    task, reads = await submit_task(gateway, lost=True), gateway.make_reader(interval=0)
    gateway.remove_accounts()
    with pytest.raises(NotFound):
        await reads.read(gateway.tenant, task.id)
    assert gateway.upstream.checks == []


async def test_remembered_queries_are_bounded(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
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
    for kept in (gateway.ledger.tasks, gateway.ledger.reservations, gateway.ledger.due_checks, gateway.ledger.tenants):
        kept.clear()


async def finish_task(gateway: FakeGateway, reads: task_status.TaskReader) -> Task:
    """Return a finished task that is cached by the process."""
    task = (await gateway.submit_image()).task
    gateway.ledger.clock.now_ms += gateway.ledger.retention.check_interval_ms
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    result = await reads.read(gateway.tenant, task.id)
    assert result.task.state is State.SUCCEEDED
    return result.task


async def test_lost_finished_task_is_recreated_despite_the_cache(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "FINISHED_TTL_SECONDS", -1)
    reads = gateway.make_reader(interval=NEVER_SECONDS)
    task = await finish_task(gateway, reads)
    await forget_tasks(gateway)
    assert (await reads.read(gateway.tenant, task.id)).task == task
    await wait_until(lambda: not reads._verifications)
    assert gateway.ledger.tasks[task.reservation].state is State.SUCCEEDED
    assert gateway.ledger.reservations[task.reservation].cost
    assert gateway.task_counts == (1, 0, 0)


async def test_cached_end_is_recorded_after_a_restore(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "FINISHED_TTL_SECONDS", -1)
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
    task, reads, others = (
        await submit_task(gateway, lost=True),
        gateway.make_reader(interval=0),
        gateway.make_reader(interval=0),
    )
    others.cache = caches.TaskCache(gateway.ledger.cache.durations)
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert (await others.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert len(gateway.upstream.checks) == 1


async def test_end_found_during_an_outage_is_recorded_afterwards(gateway: FakeGateway) -> None:
    task, reads = await submit_task(gateway), gateway.make_reader(interval=0)
    gateway.ledger.is_unavailable = True
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    gateway.ledger.is_unavailable = False
    assert (await reads.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    await wait_until(lambda: not reads._verifications)
    assert gateway.ledger.tasks[task.reservation].state is State.SUCCEEDED
