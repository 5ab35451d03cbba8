"""Checks of tasks and balances, and the expiry of leases, when calls fail."""

from __future__ import annotations

import asyncio

import pytest

from service.crypto import Keyring, TaskIdCodec
from service.domain.availability import PROBE_INTERVAL_MS
from service.domain.ledger import AccountStatus
from service.domain.tasks import State, Task
from service.usecases.ports import CheckOutcome
from tests.usecases.gateway_fixture import INTERNAL_ERROR, UNAVAILABLE, UseCases, run_job, wait_until


async def make_due_tasks(gateway: UseCases, number: int = 1) -> list[Task]:
    tasks = [await gateway.submit_task() for _ in range(number)]
    await gateway.advance(gateway.retention.check_interval_ms)
    return tasks


async def read_states(gateway: UseCases, tasks: list[Task]) -> list[State]:
    stored = [await gateway.stored(task) for task in tasks]
    return [task.state for task in stored if task]


async def test_outages_and_errors_do_not_end_the_loop(gateway: UseCases) -> None:
    gateway.faults.before["claim_checks"] = [UNAVAILABLE, INTERNAL_ERROR]
    tasks = await make_due_tasks(gateway)
    async with run_job(gateway.poller.run()), asyncio.timeout(60):
        while await read_states(gateway, tasks) != [State.SUCCEEDED]:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("fault", [UNAVAILABLE, INTERNAL_ERROR])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_unrecorded_check_is_repeated_after_its_lease(gateway: UseCases, fault: Exception, when: str) -> None:
    getattr(gateway.faults, when)["record_check"] = [fault]
    tasks = await make_due_tasks(gateway)
    await gateway.poll(0)
    await gateway.poll(gateway.retention.claim_lease_ms)
    assert await read_states(gateway, tasks) == [State.SUCCEEDED]
    assert await gateway.task_counts() == (1, 0, 0)


def count_calls(gateway: UseCases, name: str) -> int:
    return sum(called == name for called, _ in gateway.faults.calls)


@pytest.mark.parametrize("fault", [UNAVAILABLE, INTERNAL_ERROR])
async def test_unrecorded_checks_of_running_tasks_are_repeated_after_their_lease(
    gateway: UseCases, fault: Exception
) -> None:
    gateway.faults.before["record_running"] = [fault]
    tasks = await make_due_tasks(gateway)
    gateway.upstream.queue_checks(CheckOutcome.RUNNING)
    await gateway.poll(0)
    assert await read_states(gateway, tasks) == [State.QUEUED]
    await gateway.poll(gateway.retention.claim_lease_ms)
    assert await read_states(gateway, tasks) == [State.SUCCEEDED]


async def test_checks_of_running_tasks_are_recorded_together(gateway: UseCases) -> None:
    """They are also recorded at the end of the poller, and readers of this process get the change."""
    tasks = await make_due_tasks(gateway, 2)
    gateway.upstream.queue_checks(*[CheckOutcome.RUNNING] * 2)
    with gateway.cache.subscribe(tasks[0].reservation):
        async with run_job(gateway.poller.run()):
            await wait_until(lambda: len(gateway.upstream.checks) == 2)
        cached = gateway.cache.latest(tasks[0].reservation)
    assert await read_states(gateway, tasks) == [State.RUNNING] * 2
    assert cached
    assert cached.task.state is State.RUNNING
    assert count_calls(gateway, "record_running") == 1
    assert count_calls(gateway, "record_check") == 0


async def test_awaited_task_is_checked_before_others(gateway: UseCases) -> None:
    tasks, reader = await make_due_tasks(gateway, 3), gateway.make_reader(interval=0.001)
    wait = asyncio.create_task(reader.read(gateway.tenant, tasks[2].id, wait_seconds=60))
    async with run_job(reader.touch_watched()):
        await wait_until(lambda: count_calls(gateway, "touch") >= 3)
    await gateway.poll(0)
    assert gateway.upstream.checks[0] == "up-3"
    await wait


async def test_checks_are_limited_and_cancelled_with_the_poller(gateway: UseCases) -> None:
    tasks = await make_due_tasks(gateway, 5)
    gateway.upstream.may_respond.clear()
    async with run_job(gateway.poller.run()):
        await wait_until(lambda: len(gateway.upstream.checks) == gateway.poller.max_concurrent)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(gateway.upstream.checks) == 2
    gateway.upstream.may_respond.set()
    await gateway.poller.wait_idle()
    await gateway.poll(0)  # their claims were released
    assert set(await read_states(gateway, tasks)) == {State.SUCCEEDED}


async def test_nothing_is_claimed_before_the_registry_is_loaded(gateway: UseCases) -> None:
    tasks = await make_due_tasks(gateway)
    gateway.registry.is_ready = False
    await gateway.poll(0)
    assert gateway.upstream.checks == []
    gateway.registry.is_ready = True
    await gateway.poll(0)
    assert await read_states(gateway, tasks) == [State.SUCCEEDED]


async def test_task_of_a_removed_account_is_lost_in_time(gateway: UseCases) -> None:
    (task,) = await make_due_tasks(gateway)
    await gateway.change_registry(drop_accounts=tuple(gateway.registry.current.accounts.values()))
    for _ in range(3):
        await gateway.poll(0)
        await gateway.advance(gateway.retention.lost_after_ms)
    ended = await gateway.stored(task)
    assert ended
    assert (ended.state, ended.error and ended.error.code) == (State.FAILED, "task-lost")
    assert await gateway.task_counts() == (1, 0, 0)
    assert gateway.upstream.checks == []


async def test_task_without_its_key_is_kept(gateway: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = await make_due_tasks(gateway)
    with monkeypatch.context() as patched:
        other_key = TaskIdCodec(Keyring([b"x" * 32]).derive("task-id"))
        patched.setattr(gateway.task_ids, "decode", other_key.decode)
        for _ in range(3):
            await gateway.poll(gateway.retention.lost_after_ms)
    assert await read_states(gateway, tasks) == [State.QUEUED]
    await gateway.poll(gateway.retention.lost_after_ms)
    assert await read_states(gateway, tasks) == [State.SUCCEEDED]


async def test_expiry_survives_outages_and_errors(gateway: UseCases) -> None:
    gateway.upstream.may_respond.clear()
    caller = asyncio.create_task(gateway.submit())
    await wait_until(lambda: bool(gateway.upstream.submits))
    await gateway.advance(gateway.retention.lease_ms)
    gateway.faults.before["settle_expired"] = [UNAVAILABLE, INTERNAL_ERROR]
    async with run_job(gateway.poller.expire_leases()), asyncio.timeout(60):
        while await gateway.task_counts() != (1, 0, 0):
            await asyncio.sleep(0.001)
    gateway.upstream.may_respond.set()
    assert await gateway.stored((await caller).task)
    assert await gateway.task_counts() == (1, 0, 1)


async def exhaust_account(gateway: UseCases) -> None:
    """Spend the last use of an account, then top it up."""
    gateway.upstream.count, gateway.upstream.money = 1, 0
    await gateway.submit_task()
    await gateway.poll()
    assert (await gateway.account()).status is AccountStatus.EXHAUSTED
    gateway.upstream.count = 4
    gateway.upstream.checks.clear()


async def test_balance_checks_survive_outages_and_errors(gateway: UseCases) -> None:
    """They also survive a check without a response, and of all processes only one checks a balance."""
    await exhaust_account(gateway)
    gateway.faults.before["claim_balance_check"] = [UNAVAILABLE]
    gateway.upstream.errors.append(INTERNAL_ERROR)
    async with run_job(gateway.refresher.run()):
        await gateway.advance(PROBE_INTERVAL_MS)
        await wait_until(lambda: not gateway.upstream.errors)
    gateway.upstream.queue_checks(CheckOutcome.NO_RESPONSE)
    for _ in range(2):
        await gateway.advance(PROBE_INTERVAL_MS)
        await asyncio.gather(gateway.refresher.refresh_due(), gateway.refresher.refresh_due())
    assert len(gateway.upstream.checks) == 3
    assert (await gateway.account()).status is AccountStatus.OPEN


async def test_probes_replace_balance_checks_of_a_task_that_the_upstream_lost(gateway: UseCases) -> None:
    await exhaust_account(gateway)
    gateway.upstream.queue_checks(*[CheckOutcome.NOT_FOUND] * 2)
    for _ in range(2):
        await gateway.advance(PROBE_INTERVAL_MS)
        await gateway.refresher.refresh_due()
    assert len(gateway.upstream.checks) == 1
    await gateway.submit_task()
    assert gateway.upstream.submits == ["main", "main"]
