"""Late settlements."""

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


async def test_late_settlements_have_no_request_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settlement, "RETRY_SECONDS", (0.0,))
    ledger, background = FakeLedger(is_unavailable=True), TaskSupervisor()
    book = SettlementQueue(ledger, background, FakeRegistry(ledger))
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logged:
        for name in ("one", "two"):
            with structlog.contextvars.bound_contextvars(request_id=f"request-{name}"):
                await book.settle(
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
    events = [(item["event"], item["reservation"], item.get("request_id")) for item in logged]
    assert events == [
        ("settlement.retrying", "one", "request-one"),
        ("settlement.retrying", "two", "request-two"),
        ("reservation.settled", "one", None),
        ("reservation.settled", "two", None),
    ]
