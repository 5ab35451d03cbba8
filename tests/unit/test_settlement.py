"""Outcomes that are booked late belong to no request of their own time."""

from __future__ import annotations

import pytest
import structlog

from service.domain.ledger import ReservationState
from service.domain.tasks import Kind
from service.usecases import settlement
from service.usecases.background import TaskSupervisor
from service.usecases.ports import Settlement
from service.usecases.settlement import SettlementQueue
from tests.fakes import FakeLedger, FakeRegistry


async def test_late_outcomes_are_of_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is booked late, for whichever requests, is not logged as the doing of the one that was late first."""
    monkeypatch.setattr(settlement, "RETRY_SECONDS", (0.0,))
    ledger, background = FakeLedger(is_unavailable=True), TaskSupervisor()
    book = SettlementQueue(ledger, background, FakeRegistry(ledger))
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logged:
        for name in ("one", "two"):
            with structlog.contextvars.bound_contextvars(request_id=f"request-{name}"):
                await book(
                    Settlement(
                        reservation=name,
                        tenant=1,
                        account=2,
                        kind=Kind.UPSCALE,
                        created_at=0,
                        outcome=ReservationState.UNKNOWN,
                    )
                )
        ledger.is_unavailable = False
        assert await background.drain(10) == 0
    told = [(each["event"], each["reservation"], each.get("request_id")) for each in logged]
    assert told == [
        ("settlement.retrying", "one", "request-one"),
        ("settlement.retrying", "two", "request-two"),
        ("reservation.settled", "one", None),
        ("reservation.settled", "two", None),
    ]
