"""Whatever fails between reserving and settling, the money is accounted for, and nothing is sent twice."""

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
    """The use cases, with no pauses between the tries to book an outcome."""
    monkeypatch.setattr(settlement, "RETRY_SECONDS", (0,))
    return FakeGateway(ONCE)


async def test_fault_of_the_client(gateway: FakeGateway) -> None:
    """A crash while sending counts as sent: it stays charged, holds no active place, and is not sent again."""
    gateway.upstream.errors.append(RuntimeError("a fault of ours"))
    with pytest.raises(SubmissionUnknown) as told:
        await gateway.submit_image()
    assert gateway.task_counts == (1, 0, 0)
    assert len(gateway.upstream.submits) == 1
    assert gateway.ledger.reservations[told.value.submission_id].state is ReservationState.UNKNOWN


async def test_fault_after_the_acceptance(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash after the upstream accepted is told as unknown, with the id under which it stands in the ledger."""
    monkeypatch.setattr(gateway.task_ids, "encode", lambda _: 1 / 0)
    with pytest.raises(SubmissionUnknown):
        await gateway.submit_image()
    assert gateway.task_counts == (1, 0, 0)


@pytest.mark.parametrize(
    "fault", [KeyError("x"), OSError("x"), asyncio.CancelledError(), ExceptionGroup("x", [ValueError()])]
)
@pytest.mark.parametrize("step", ["submission", "settle", "settled", "submitted"])
async def test_any_exception_after_the_acceptance(
    gateway: FakeGateway, step: str, fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is raised once the upstream has accepted, the caller gets its task, and it is booked exactly once."""

    def failing(*_: object) -> None:
        raise fault

    if step in {"submission", "submitted"}:
        if isinstance(fault, asyncio.CancelledError):
            fault = RuntimeError("what counts is never cancelled")
        monkeypatch.setattr(gateway.metrics, step, failing)
    else:
        times = gateway.ledger.errors_before if step == "settle" else gateway.ledger.errors_after
        times["settle"] = [fault]
    submission = await gateway.submit_image()
    assert await gateway.background.drain(5) == 0
    assert gateway.task_counts == (1, 0, 1)
    assert gateway.ledger.tasks[submission.task.reservation].id == submission.task.id
    assert len(gateway.upstream.submits) == 1


async def test_process_ends_while_it_books(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller whose submission was accepted has its task even if the process ends before that is booked."""
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
async def test_unanswered_reserve(gateway: FakeGateway, fault: Exception, when: str) -> None:
    """Without a verdict nothing is sent, and the place is given back whether or not it was held."""
    getattr(gateway.ledger, when)["reserve"] = [fault]
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


async def test_fault_after_the_verdict(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between the verdict and sending gives the place back, since nothing was sent."""
    with monkeypatch.context() as patched:
        patched.setattr(submit, "compute_rate_limits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await gateway.submit_image()
    assert await gateway.background.drain(5) == 0
    assert gateway.task_counts == (0, 0, 0)
    assert gateway.upstream.submits == []


@pytest.mark.parametrize("fault", [UNAVAILABLE, RuntimeError("a fault of ours")])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_unanswered_settlement(gateway: FakeGateway, fault: Exception, when: str) -> None:
    """The caller has its task although it could not be booked, and it is booked once, as soon as that is possible."""
    getattr(gateway.ledger, when)["settle"] = [fault, UNAVAILABLE, RuntimeError("again"), UNAVAILABLE]
    submission = await gateway.submit_image()
    assert bytes(submission.task.metadata) == b'{"order":"17"}'
    assert await gateway.background.drain(5) == 0
    assert gateway.task_counts == (1, 0, 1)
    assert gateway.ledger.tasks[submission.task.reservation].id == submission.task.id
    assert len(gateway.upstream.submits) == 1


async def test_settled_after_its_lease(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """An acceptance that can be booked only after its lease has run out replaces the unknown outcome."""
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
async def test_refused_for_good(gateway: FakeGateway, outcome: SubmitOutcome, error: type[GatewayError]) -> None:
    """A refusal that is not about the account costs nothing, and the image is not sent to another account."""
    gateway.upstream.next_submits.append(SubmitResult(outcome=outcome, retry_after_seconds=7))
    with pytest.raises(error) as caught:
        await gateway.submit_image()
    assert caught.value.retry_after == (7 if outcome is SubmitOutcome.BUSY else None)
    assert len(gateway.upstream.submits) == 1
    assert gateway.task_counts == (0, 0, 0)


async def test_caller_leaves(gateway: FakeGateway) -> None:
    """A caller that goes away while its image is sent changes nothing."""
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


async def test_process_ends(gateway: FakeGateway) -> None:
    """A process that can't wait any longer settles what it has sent as unknown instead of leaving it to the lease."""
    gateway.upstream.may_respond.clear()
    caller = asyncio.create_task(gateway.submit_image())
    await wait_until(lambda: bool(gateway.upstream.submits))
    assert await gateway.background.drain(0) == 1
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert gateway.task_counts == (1, 0, 0)


async def test_process_ends_without_the_store(gateway: FakeGateway) -> None:
    """A process that can neither wait nor book ends all the same; the lease settles what it leaves."""
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
async def test_unanswered_retarget(
    gateway: FakeGateway, when: str, outcome: SubmitOutcome, error: type[Exception]
) -> None:
    """Without a verdict on the next account nothing more is sent, the place is given back, and that account is open."""
    gateway.upstream.next_submits.append(SubmitResult(outcome=outcome))
    getattr(gateway.ledger, when)["change_account"] = [UNAVAILABLE]
    with pytest.raises(error):
        await gateway.submit_image()
    assert [name for name, _, _ in gateway.upstream.submits] == ["main"]
    assert gateway.task_counts == (0, 0, 0)
    assert [state.open_submissions for state in gateway.ledger.states_by_account.values()] == [0, 0]
    assert gateway.ledger.states_by_account[3].status is AccountStatus.OPEN


async def test_next_account_can_not_pay_either(gateway: FakeGateway) -> None:
    """Each account is asked at most once, and the last one's answer is the caller's."""
    gateway.upstream.next_submits += [SubmitResult(outcome=SubmitOutcome.INVALID_ACCOUNT)]
    gateway.upstream.next_submits += [SubmitResult(outcome=SubmitOutcome.EXHAUSTED)]
    with pytest.raises(BalanceExhausted):
        await gateway.submit_image()
    assert [name for name, _, _ in gateway.upstream.submits] == ["main", "spare"]
    assert gateway.task_counts == (0, 0, 0)
    states = gateway.ledger.states_by_account
    assert (states[2].status, states[3].status) == (AccountStatus.INVALID, AccountStatus.EXHAUSTED)


@pytest.mark.parametrize("outcome", [SubmitOutcome.REJECTED, SubmitOutcome.UNKNOWN])
async def test_no_second_account(gateway: FakeGateway, outcome: SubmitOutcome) -> None:
    """What may have been charged, or was refused for its image, is not sent to another account."""
    gateway.upstream.next_submits.append(SubmitResult(outcome=outcome, reason="too dark"))
    with pytest.raises(Exception, match=r"nothing was charged|no usable answer"):
        await gateway.submit_image()
    assert [name for name, _, _ in gateway.upstream.submits] == ["main"]


async def test_time_to_send(gateway: FakeGateway) -> None:
    """Sending has what the lease lasts less its margin, on the second account only what the first has left of it."""
    gateway.upstream.next_submits.append(SubmitResult(outcome=SubmitOutcome.NOT_SENT))
    await gateway.submit_image()
    first, second = gateway.upstream.timeouts
    assert 0 < second < first <= gateway.ledger.retention.lease_ms / 1000 - LEASE_MARGIN_SECONDS


async def test_no_account(gateway: FakeGateway) -> None:
    """A tenant none of whose accounts exists reserves nothing."""
    gateway.remove_accounts()
    with pytest.raises(AccountMisconfigured):
        await gateway.submit_image()
    assert gateway.ledger.reservations == {}
