"""Failures between reserving and settling that the property test of submissions does not inject."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from msgspec.structs import replace

from service.domain.errors import (
    AccountMisconfigured,
    LedgerUnavailable,
    QuotaDenied,
    SubmissionUnknown,
    UpstreamUnavailable,
)
from service.domain.ledger import AccountStatus, ReservationState, window_bounds
from service.domain.tenants import Limit, TenantPolicy, Window
from service.usecases import submit
from service.usecases.ports import ReserveRequest, Settlement, SubmitOutcome, SubmitResult
from tests.usecases.gateway_fixture import INTERNAL_ERROR, MAIN, SPARE, TENANT, UNAVAILABLE, UseCases


async def test_error_after_the_acceptance_is_unknown(gateway: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.submitter.task_ids, "encode", lambda _: 1 / 0)
    with pytest.raises(SubmissionUnknown):
        await gateway.submit()
    assert await gateway.task_counts() == (1, 0, 0)


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        ("submissions", KeyError("x")),
        ("before", OSError("x")),
        ("before", asyncio.CancelledError()),
        ("after", asyncio.CancelledError()),
        ("after", ExceptionGroup("x", [ValueError()])),
        ("tasks_submitted", KeyError("x")),
    ],
)
async def test_any_exception_after_the_acceptance_returns_the_task(
    gateway: UseCases, step: str, fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise fault

    if step in {"before", "after"}:
        getattr(gateway.faults, step)["settle"] = [fault]
    else:
        monkeypatch.setattr(getattr(gateway.metrics, step), "labels", fail)
    task = (await gateway.submit()).task
    assert await gateway.background.drain(60) == 0
    assert await gateway.task_counts() == (1, 0, 1)
    assert await gateway.stored(task) == task
    assert len(gateway.upstream.submits) == 1


async def test_shutdown_while_settling_returns_the_task(gateway: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    settling = asyncio.Event()

    async def hang(*_: object) -> bool:
        settling.set()
        return await asyncio.Event().wait()

    monkeypatch.setattr(gateway.redis_ledger, "settle", hang)
    caller = asyncio.create_task(gateway.submit())
    await settling.wait()
    assert await gateway.background.drain(0) == 2
    assert (await caller).task.reservation in await gateway.reservations()


async def test_outcomes_are_written_after_each_outage(gateway: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can't be written blocks no other."""
    settle, attempts = gateway.redis_ledger.settle, Counter[str]()

    async def fail(settlement: Settlement) -> bool:
        attempts[settlement.reservation] += 1
        if settlement.reservation == next(iter(attempts)) or attempts[settlement.reservation] == 1:
            raise INTERNAL_ERROR
        return await settle(settlement)

    async with asyncio.timeout(60):
        with monkeypatch.context() as patched:
            patched.setattr(gateway.redis_ledger, "settle", fail)
            stuck, other = [await gateway.submit_task() for _ in range(2)]
            while not await gateway.stored(other):
                await asyncio.sleep(0.001)
        while not await gateway.stored(stuck) or gateway.submitter.settlements.pending_count:
            await asyncio.sleep(0.001)
        gateway.faults.before["settle"] = [UNAVAILABLE]
        later = await gateway.submit_task()
        while not await gateway.stored(later):
            await asyncio.sleep(0.001)


async def test_tombstone_of_a_failed_reserve_refuses_it_later(gateway: UseCases) -> None:
    gateway.faults.before["reserve"] = [UNAVAILABLE]
    gateway.faults.before["settle"] = [UNAVAILABLE, INTERNAL_ERROR]
    with pytest.raises(LedgerUnavailable):
        await gateway.submit()
    assert await gateway.background.drain(60) == 0
    ((name, tombstone),) = (await gateway.reservations()).items()
    assert tombstone.state is ReservationState.NOT_SENT
    with pytest.raises(LedgerUnavailable):
        await gateway.redis_ledger.reserve(ReserveRequest(name, TENANT, (MAIN,), tombstone.kind))
    assert gateway.upstream.submits == []


async def test_error_before_sending_frees_the_place(gateway: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "compute_rate_limits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await gateway.submit()
    assert await gateway.background.drain(60) == 0
    assert await gateway.task_counts() == (0, 0, 0)
    assert gateway.upstream.submits == []


async def test_undecryptable_key_fails_over_and_closes_nothing(gateway: UseCases) -> None:
    misconfigured = SubmitResult(outcome=SubmitOutcome.MISCONFIGURED)
    gateway.upstream.next_submits += [misconfigured] * 3
    with pytest.raises(AccountMisconfigured):
        await gateway.submit()
    await gateway.submit()
    assert gateway.upstream.submits == ["main", "spare"] * 2
    assert await gateway.task_counts() == (1, 0, 1)
    assert [(await gateway.account(item)).status for item in (MAIN, SPARE)] == [AccountStatus.OPEN] * 2


@pytest.mark.parametrize(("seconds", "retry_after"), [(0, 0), (None, submit.BUSY_RETRY_SECONDS)])
async def test_busy_upstream(gateway: UseCases, seconds: float | None, retry_after: float) -> None:
    gateway.upstream.next_submits.append(SubmitResult(outcome=SubmitOutcome.BUSY, retry_after_seconds=seconds))
    with pytest.raises(UpstreamUnavailable) as caught:
        await gateway.submit()
    assert caught.value.retry_after == retry_after


async def test_retry_after_is_that_of_the_last_reset(gateway: UseCases) -> None:
    policy = TenantPolicy(tuple(Limit(window, tasks=0) for window in (Window.MINUTE, Window.HOUR)))
    await gateway.change_registry(tenants=(replace(gateway.tenant, policy=policy),))
    with pytest.raises(QuotaDenied) as caught:
        await gateway.submit()
    _, end = window_bounds(Window.HOUR, gateway.now_ms)
    assert end
    assert caught.value.retry_after == (end - gateway.now_ms) / 1000


async def test_tenant_without_accounts_reserves_nothing(gateway: UseCases) -> None:
    await gateway.change_registry(drop_accounts=tuple(gateway.registry.current.accounts.values()))
    with pytest.raises(AccountMisconfigured):
        await gateway.submit()
    assert await gateway.reservations() == {}
