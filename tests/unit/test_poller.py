"""The poller of running tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.crypto import Keyring, TaskIdCodec
from service.domain.tasks import State, Task
from service.usecases import background, poller
from service.usecases.ports import CheckOutcome, CheckResult
from tests.unit.fake_gateway import UNAVAILABLE, FakeGateway, wait_until

UNEXPECTED_ERROR = RuntimeError("a fault of ours")


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> FakeGateway:
    """Use cases whose poller does not pause."""
    monkeypatch.setattr(poller, "EXPIRY_INTERVAL_SECONDS", 0)
    monkeypatch.setattr(background, "IDLE_SECONDS", 0)
    monkeypatch.setattr(background, "UNAVAILABLE_SECONDS", 0)
    return FakeGateway()


async def make_due_tasks(gateway: FakeGateway, number: int = 1) -> list[Task]:
    tasks = [(await gateway.submit_image()).task for _ in range(number)]
    gateway.ledger.clock.now_ms += gateway.ledger.retention.check_interval_ms
    return tasks


def task_states(gateway: FakeGateway) -> list[State]:
    return [task.state for task in gateway.ledger.tasks.values()]


@asynccontextmanager
async def run_poller(gateway: FakeGateway) -> AsyncIterator[asyncio.Task[None]]:
    running = asyncio.create_task(gateway.poller.run())
    try:
        yield running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("fault", [UNAVAILABLE, UNEXPECTED_ERROR])
async def test_outages_and_errors_do_not_end_the_loop(gateway: FakeGateway, fault: Exception) -> None:
    gateway.ledger.errors_before["claim_checks"] = [fault, fault]
    await make_due_tasks(gateway)
    async with run_poller(gateway):
        await wait_until(lambda: task_states(gateway) == [State.SUCCEEDED])


@pytest.mark.parametrize("fault", [UNAVAILABLE, UNEXPECTED_ERROR])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_unrecorded_check_is_repeated_after_its_lease(gateway: FakeGateway, fault: Exception, when: str) -> None:
    getattr(gateway.ledger, f"errors_{when}")["record_check"] = [fault]
    await make_due_tasks(gateway)
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    gateway.ledger.clock.now_ms += gateway.ledger.retention.claim_lease_ms
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    assert task_states(gateway) == [State.SUCCEEDED]
    assert gateway.task_counts == (1, 0, 0)


async def test_failed_check_is_repeated_after_its_lease(gateway: FakeGateway) -> None:
    await make_due_tasks(gateway, 2)
    gateway.upstream.errors.append(UNEXPECTED_ERROR)
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    assert sorted(task_states(gateway)) == [State.QUEUED, State.SUCCEEDED]
    gateway.ledger.clock.now_ms += gateway.ledger.retention.claim_lease_ms
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    assert task_states(gateway) == [State.SUCCEEDED] * 2


async def test_concurrent_checks_are_limited(gateway: FakeGateway) -> None:
    await make_due_tasks(gateway, 5)
    gateway.upstream.may_respond.clear()
    async with run_poller(gateway):
        await wait_until(lambda: len(gateway.upstream.checks) == 2)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(gateway.upstream.checks) == 2
        gateway.upstream.may_respond.set()
        await wait_until(lambda: task_states(gateway) == [State.SUCCEEDED] * 5)


async def test_cancellation_does_not_wait_for_checks(gateway: FakeGateway) -> None:
    await make_due_tasks(gateway)
    gateway.upstream.may_respond.clear()
    async with run_poller(gateway):
        await wait_until(lambda: bool(gateway.upstream.checks))
    assert task_states(gateway) == [State.QUEUED]
    gateway.upstream.may_respond.set()
    await gateway.poller.wait_idle()
    gateway.ledger.clock.now_ms += gateway.ledger.retention.claim_lease_ms - 1
    assert await gateway.ledger.claim_checks(10) == []
    gateway.ledger.clock.now_ms += 1
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    assert task_states(gateway) == [State.SUCCEEDED]


async def test_nothing_is_claimed_before_the_registry_is_loaded(gateway: FakeGateway) -> None:
    gateway.registry.is_ready = False
    await make_due_tasks(gateway)
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    assert task_states(gateway) == [State.QUEUED]
    gateway.registry.is_ready = True
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    assert task_states(gateway) == [State.SUCCEEDED]


async def test_task_of_a_removed_account_is_lost_in_time(gateway: FakeGateway) -> None:
    (task,) = await make_due_tasks(gateway)
    gateway.remove_accounts()
    for _ in range(3):
        await gateway.poller.start_due()
        await gateway.poller.wait_idle()
        gateway.ledger.clock.now_ms += gateway.ledger.retention.lost_after_ms
    ended = gateway.ledger.tasks[task.reservation]
    assert (ended.state, ended.error and ended.error.code) == (State.FAILED, "task-lost")
    assert gateway.task_counts == (1, 0, 0)
    assert gateway.upstream.checks == []


async def test_task_without_its_key_is_kept(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = await make_due_tasks(gateway)
    with monkeypatch.context() as patched:
        patched.setattr(gateway.task_ids, "decode", TaskIdCodec(Keyring([b"x" * 32]).derive("task-id")).decode)
        for misses in (1, 2, 3):
            await gateway.poller.start_due()
            await gateway.poller.wait_idle()
            again = gateway.ledger.clock.now_ms + (gateway.ledger.retention.check_interval_ms << misses)
            assert gateway.ledger.due_checks[task.reservation] == again
            gateway.ledger.clock.now_ms += gateway.ledger.retention.lost_after_ms
    assert task_states(gateway) == [State.QUEUED]
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    assert task_states(gateway) == [State.SUCCEEDED]


async def test_running_task_is_rescheduled(gateway: FakeGateway) -> None:
    gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.RUNNING))
    await make_due_tasks(gateway)
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    assert task_states(gateway) == [State.RUNNING]
    gateway.ledger.clock.now_ms += gateway.ledger.retention.check_interval_ms
    await gateway.poller.start_due()
    await gateway.poller.wait_idle()
    assert task_states(gateway) == [State.SUCCEEDED]


async def test_expiry_survives_outages_and_errors(gateway: FakeGateway) -> None:
    gateway.upstream.may_respond.clear()
    caller = asyncio.create_task(gateway.submit_image())
    await wait_until(lambda: bool(gateway.upstream.submits))
    gateway.ledger.clock.now_ms += gateway.ledger.retention.lease_ms
    gateway.ledger.errors_before["settle_expired"] = [UNAVAILABLE, UNEXPECTED_ERROR]
    expiring = asyncio.create_task(gateway.poller.expire_leases())
    await wait_until(lambda: gateway.task_counts == (1, 0, 0))
    expiring.cancel()
    gateway.upstream.may_respond.set()
    assert (await caller).task.reservation in gateway.ledger.tasks
    assert gateway.task_counts == (1, 0, 1)


async def check_repeatedly(gateway: FakeGateway, *responses: CheckOutcome, interval_ms: int) -> None:
    """Check the only task repeatedly at this interval."""
    for answered in responses:
        gateway.ledger.clock.now_ms += interval_ms
        gateway.upstream.next_checks.append(CheckResult(outcome=answered))
        await gateway.poller.start_due()
        await gateway.poller.wait_idle()


@pytest.mark.parametrize("also", [CheckOutcome.INVALID, CheckOutcome.NOT_FOUND])
async def test_unusable_responses_fail_the_task_in_time(gateway: FakeGateway, also: CheckOutcome) -> None:
    (task,) = await make_due_tasks(gateway)
    every = gateway.ledger.retention.unusable_after_ms // 6
    await check_repeatedly(gateway, *[CheckOutcome.INVALID, also] * 3, interval_ms=every)
    assert task_states(gateway) == [State.QUEUED]
    await check_repeatedly(gateway, CheckOutcome.INVALID, interval_ms=every)
    ended = gateway.ledger.tasks[task.reservation]
    assert (ended.state, ended.error and ended.error.code) == (State.FAILED, "result-unusable")
    assert gateway.task_counts == (1, 0, 0)


@pytest.mark.parametrize("between", [CheckOutcome.RUNNING, CheckOutcome.NO_RESPONSE])
async def test_valid_responses_reset_the_timeout(gateway: FakeGateway, between: CheckOutcome) -> None:
    await make_due_tasks(gateway)
    half = gateway.ledger.retention.unusable_after_ms // 2
    await check_repeatedly(
        gateway, CheckOutcome.INVALID, CheckOutcome.INVALID, between, CheckOutcome.INVALID, interval_ms=half
    )
    assert not any(state.is_final for state in task_states(gateway))
    await check_repeatedly(gateway, CheckOutcome.INVALID, interval_ms=half)
    assert task_states(gateway) == [State.RUNNING if between is CheckOutcome.RUNNING else State.FAILED]
