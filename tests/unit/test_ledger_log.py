"""Log log_lines of settlements and finished tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.domain.ledger import Balance
from service.domain.tasks import Kind
from service.usecases import poller
from service.usecases.ports import CheckOutcome, CheckResult, SubmitOutcome, SubmitResult
from tests.unit.fake_gateway import UNAVAILABLE, FakeGateway, wait_until

FACE = Kind.FACE_ENHANCE
Lines = list[MutableMapping[str, Any]]


@pytest.fixture
def log_lines() -> Iterator[Lines]:
    with capture_logs() as captured:
        yield captured


def select_lines(log_lines: Lines, event: str) -> Lines:
    return [line for line in log_lines if line["event"] == event]


async def test_settlement_is_logged_with_the_balance(log_lines: Lines) -> None:
    gateway = FakeGateway()
    gateway.upstream.next_submits.append(
        SubmitResult(outcome=SubmitOutcome.ACCEPTED, upstream_id="u1", balance=Balance(count=4, money_fen=150))
    )
    task = (await gateway.submit_image()).task
    (line,) = select_lines(log_lines, "reservation.settled")
    assert line == {
        "event": "reservation.settled",
        "log_level": "info",
        "reservation": task.reservation,
        "tenant": "shop",
        "account": "main",
        "kind": task.kind,
        "outcome": "accepted",
        "booked": True,
        "by": "sender",
        "remaining_uses": 4,
        "remaining_yuan": 1.5,
        "closes": None,
    }


async def test_unknown_outcome_is_a_warning(log_lines: Lines) -> None:
    gateway = FakeGateway()
    gateway.upstream.next_submits.append(SubmitResult(outcome=SubmitOutcome.UNKNOWN))
    with pytest.raises(Exception, match=r"submission|upstream"):
        await gateway.submit_image()
    (line,) = select_lines(log_lines, "reservation.settled")
    assert (line["log_level"], line["outcome"], line["by"]) == ("warning", "unknown", "sender")


async def test_delayed_settlement_is_logged_twice(log_lines: Lines) -> None:
    gateway = FakeGateway()
    gateway.ledger.errors_before["settle"] = [UNAVAILABLE]
    task = (await gateway.submit_image()).task
    await gateway.background.drain(5)
    assert [line["event"] for line in log_lines] == ["settlement.retrying", "reservation.settled"]
    assert {line["reservation"] for line in log_lines} == {task.reservation}


async def test_expired_submission_is_logged(log_lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller, "EXPIRY_INTERVAL_SECONDS", 0)
    gateway = FakeGateway()
    gateway.upstream.may_respond.clear()
    callers = [asyncio.create_task(gateway.submit_image()) for _ in range(2)]
    await wait_until(lambda: len(gateway.upstream.submits) == 2)
    gateway.ledger.clock.now_ms += gateway.ledger.retention.lease_ms
    expiring = asyncio.create_task(gateway.poller.expire_leases())
    await wait_until(lambda: len(select_lines(log_lines, "reservation.settled")) == 2)
    expiring.cancel()
    assert {item["reservation"] for item in log_lines} == set(gateway.ledger.reservations)
    for line in log_lines:
        assert (line["log_level"], line["by"], line["outcome"]) == ("warning", "expiry", "unknown")
        assert (line["tenant"], line["account"]) == ("shop", "main")
    gateway.upstream.may_respond.set()
    await asyncio.gather(*callers)


async def test_finished_task_is_logged_once_with_its_cost(log_lines: Lines) -> None:
    gateway = FakeGateway()
    task = (await gateway.submit_image()).task
    gateway.ledger.clock.now_ms += gateway.ledger.retention.check_interval_ms
    gateway.upstream.next_checks.append(CheckResult(outcome=CheckOutcome.SUCCEEDED, balance=Balance(count=3)))
    for _ in range(3):
        await gateway.poller.start_due()
        await gateway.poller.wait_idle()
        gateway.ledger.clock.now_ms += gateway.ledger.retention.claim_lease_ms
    (line,) = select_lines(log_lines, "task.finished")
    ended = gateway.ledger.tasks[task.reservation]
    assert line == {
        "event": "task.finished",
        "log_level": "info",
        "reservation": task.reservation,
        "tenant": "shop",
        "account": "main",
        "kind": task.kind,
        "state": "succeeded",
        "seconds": gateway.ledger.retention.check_interval_ms / 1000,
        "uses": ended.cost.count,
        "yuan": ended.cost.money_fen / 100,
        "basis": ended.cost.basis,
        "error": None,
    }
