"""Failures between reserving and settling."""

from __future__ import annotations

import asyncio

import pytest

from service.domain.errors import (
    AccountMisconfigured,
    BalanceExhausted,
    GatewayError,
    LedgerUnavailable,
    SubmissionUnknown,
    UpstreamRejected,
    UpstreamUnavailable,
)
from service.domain.ledger import AccountStatus, ReservationState
from service.domain.tenants import Limit, TenantPolicy, Window
from service.usecases import settlement, submit
from service.usecases.ports import ReserveRequest, SubmitOutcome, SubmitResult
from service.usecases.submit import LEASE_MARGIN_SECONDS
from tests.unit.fake_gateway import UNAVAILABLE, FakeGateway, wait_until

ONCE = TenantPolicy(limits=(Limit(Window.DAY, tasks=1),))


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> FakeGateway:
    """Use cases without delays between settlement retries."""
    monkeypatch.setattr(settlement, "RETRY_SECONDS", (0,))
    return FakeGateway(ONCE)


async def test_client_error_while_sending_stays_charged(gateway: FakeGateway) -> None:
    gateway.upstream.errors.append(RuntimeError("a fault of ours"))
    with pytest.raises(SubmissionUnknown) as caught:
        await gateway.submit_image()
    assert gateway.task_counts == (1, 0, 0)
    assert len(gateway.upstream.submits) == 1
    assert gateway.ledger.reservations[caught.value.submission_id].state is ReservationState.UNKNOWN


async def test_error_after_the_acceptance_is_unknown(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.task_ids, "encode", lambda _: 1 / 0)
    with pytest.raises(SubmissionUnknown):
        await gateway.submit_image()
    assert gateway.task_counts == (1, 0, 0)


@pytest.mark.parametrize(
    "fault", [KeyError("x"), OSError("x"), asyncio.CancelledError(), ExceptionGroup("x", [ValueError()])]
)
@pytest.mark.parametrize("step", ["submissions", "settle", "settled", "tasks_submitted"])
async def test_any_exception_after_the_acceptance_returns_the_task(
    gateway: FakeGateway, step: str, fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise fault

    if step in {"submissions", "tasks_submitted"}:
        if isinstance(fault, asyncio.CancelledError):
            fault = RuntimeError("what counts is never cancelled")
        monkeypatch.setattr(getattr(gateway.metrics, step), "labels", failing)
    else:
        times = gateway.ledger.errors_before if step == "settle" else gateway.ledger.errors_after
        times["settle"] = [fault]
    submission = await gateway.submit_image()
    assert await gateway.background.drain(5) == 0
    assert gateway.task_counts == (1, 0, 1)
    assert gateway.ledger.tasks[submission.task.reservation].id == submission.task.id
    assert len(gateway.upstream.submits) == 1


async def test_shutdown_while_settling_returns_the_task(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    booking = asyncio.Event()

    async def hanging(*_: object) -> bool:
        booking.set()
        await asyncio.Event().wait()
        return False

    monkeypatch.setattr(gateway.ledger, "settle", hanging)
    caller = asyncio.create_task(gateway.submit_image())
    await booking.wait()
    assert await gateway.background.drain(0) == 2
    assert (await caller).task.reservation in gateway.ledger.reservations


@pytest.mark.parametrize("fault", [UNAVAILABLE, RuntimeError("a fault of ours")])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_failed_reserve_sends_nothing(gateway: FakeGateway, fault: Exception, when: str) -> None:
    getattr(gateway.ledger, f"errors_{when}")["reserve"] = [fault]
    gateway.ledger.errors_before["settle"] = [UNAVAILABLE, UNAVAILABLE]
    with pytest.raises(type(fault)):
        await gateway.submit_image()
    assert await gateway.background.drain(5) == 0
    assert gateway.upstream.submits == []
    (given_up,) = gateway.ledger.reservations.items()
    assert given_up[1].state is ReservationState.NOT_SENT
    await gateway.submit_image()
    assert gateway.task_counts == (1, 0, 1)
    with pytest.raises(LedgerUnavailable):
        await gateway.ledger.reserve(ReserveRequest(given_up[0], 1, (2,), given_up[1].kind))
    assert gateway.task_counts == (1, 0, 1)


async def test_error_before_sending_frees_the_place(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(submit, "compute_rate_limits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await gateway.submit_image()
    assert await gateway.background.drain(5) == 0
    assert gateway.task_counts == (0, 0, 0)
    assert gateway.upstream.submits == []


@pytest.mark.parametrize("fault", [UNAVAILABLE, RuntimeError("a fault of ours")])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_failed_settlement_is_retried(gateway: FakeGateway, fault: Exception, when: str) -> None:
    getattr(gateway.ledger, f"errors_{when}")["settle"] = [fault, UNAVAILABLE, RuntimeError("again"), UNAVAILABLE]
    submission = await gateway.submit_image()
    assert bytes(submission.task.metadata) == b'{"order":"17"}'
    assert await gateway.background.drain(5) == 0
    assert gateway.task_counts == (1, 0, 1)
    assert gateway.ledger.tasks[submission.task.reservation].id == submission.task.id
    assert len(gateway.upstream.submits) == 1


async def test_late_acceptance_replaces_unknown(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settlement, "RETRY_SECONDS", (0.1,))
    gateway.ledger.errors_before["settle"] = [UNAVAILABLE]
    submission = await gateway.submit_image()
    gateway.ledger.clock.now_ms += gateway.ledger.retention.lease_ms
    assert len(await gateway.ledger.settle_expired(10)) == 1
    assert gateway.task_counts == (1, 0, 0)
    assert await gateway.background.drain(5) == 0
    assert gateway.task_counts == (1, 0, 1)
    assert submission.task.reservation in gateway.ledger.tasks


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (SubmitOutcome.REJECTED, UpstreamRejected),
        (SubmitOutcome.REDIRECTED, AccountMisconfigured),
        (SubmitOutcome.BUSY, UpstreamUnavailable),
    ],
)
async def test_final_refusal_is_free_and_not_retried(
    gateway: FakeGateway, outcome: SubmitOutcome, error: type[GatewayError]
) -> None:
    gateway.upstream.next_submits.append(SubmitResult(outcome=outcome, retry_after_seconds=7))
    with pytest.raises(error) as caught:
        await gateway.submit_image()
    assert caught.value.retry_after == (7 if outcome is SubmitOutcome.BUSY else None)
    assert len(gateway.upstream.submits) == 1
    assert gateway.task_counts == (0, 0, 0)


async def test_cancelled_caller_changes_nothing(gateway: FakeGateway) -> None:
    gateway.upstream.may_respond.clear()
    caller = asyncio.create_task(gateway.submit_image())
    await wait_until(lambda: bool(gateway.upstream.submits))
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    gateway.upstream.may_respond.set()
    assert await gateway.background.drain(5) == 0
    assert gateway.task_counts == (1, 0, 1)
    assert len(gateway.ledger.tasks) == 1


async def test_shutdown_settles_sent_submissions_as_unknown(gateway: FakeGateway) -> None:
    gateway.upstream.may_respond.clear()
    caller = asyncio.create_task(gateway.submit_image())
    await wait_until(lambda: bool(gateway.upstream.submits))
    assert await gateway.background.drain(0) == 1
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert gateway.task_counts == (1, 0, 0)


async def test_shutdown_without_the_store(gateway: FakeGateway) -> None:
    gateway.upstream.may_respond.clear()
    caller = asyncio.create_task(gateway.submit_image())
    await wait_until(lambda: bool(gateway.upstream.submits))
    gateway.ledger.is_unavailable = True
    assert await gateway.background.drain(0) == 2
    with pytest.raises(asyncio.CancelledError):
        await caller
    gateway.ledger.is_unavailable = False
    gateway.ledger.clock.now_ms += gateway.ledger.retention.lease_ms
    assert len(await gateway.ledger.settle_expired(10)) == 1
    assert gateway.task_counts == (1, 0, 0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (SubmitOutcome.EXHAUSTED, BalanceExhausted),
        (SubmitOutcome.INVALID_ACCOUNT, AccountMisconfigured),
        (SubmitOutcome.NOT_SENT, UpstreamUnavailable),
    ],
)
async def test_failed_retarget_sends_nothing(
    gateway: FakeGateway, when: str, outcome: SubmitOutcome, error: type[Exception]
) -> None:
    gateway.upstream.next_submits.append(SubmitResult(outcome=outcome))
    getattr(gateway.ledger, f"errors_{when}")["change_account"] = [UNAVAILABLE]
    with pytest.raises(error):
        await gateway.submit_image()
    assert [name for name, _, _ in gateway.upstream.submits] == ["main"]
    assert gateway.task_counts == (0, 0, 0)
    assert [state.open_submissions for state in gateway.ledger.states_by_account.values()] == [0, 0]
    assert gateway.ledger.states_by_account[3].status is AccountStatus.OPEN


async def test_each_account_is_tried_once(gateway: FakeGateway) -> None:
    gateway.upstream.next_submits += [SubmitResult(outcome=SubmitOutcome.INVALID_ACCOUNT)]
    gateway.upstream.next_submits += [SubmitResult(outcome=SubmitOutcome.EXHAUSTED)]
    with pytest.raises(BalanceExhausted):
        await gateway.submit_image()
    assert [name for name, _, _ in gateway.upstream.submits] == ["main", "spare"]
    assert gateway.task_counts == (0, 0, 0)
    states = gateway.ledger.states_by_account
    assert (states[2].status, states[3].status) == (AccountStatus.INVALID, AccountStatus.EXHAUSTED)


@pytest.mark.parametrize("outcome", [SubmitOutcome.REJECTED, SubmitOutcome.UNKNOWN])
async def test_charged_or_rejected_submissions_do_not_fail_over(gateway: FakeGateway, outcome: SubmitOutcome) -> None:
    gateway.upstream.next_submits.append(SubmitResult(outcome=outcome, reason="too dark"))
    with pytest.raises(Exception, match=r"nothing was charged|no usable response"):
        await gateway.submit_image()
    assert [name for name, _, _ in gateway.upstream.submits] == ["main"]


async def test_send_timeout_is_bounded_by_the_lease(gateway: FakeGateway) -> None:
    gateway.upstream.next_submits.append(SubmitResult(outcome=SubmitOutcome.NOT_SENT))
    await gateway.submit_image()
    first, second = gateway.upstream.timeouts
    assert 0 < second < first <= gateway.ledger.retention.lease_ms / 1000 - LEASE_MARGIN_SECONDS


async def test_tenant_without_accounts_reserves_nothing(gateway: FakeGateway) -> None:
    gateway.remove_accounts()
    with pytest.raises(AccountMisconfigured):
        await gateway.submit_image()
    assert gateway.ledger.reservations == {}
