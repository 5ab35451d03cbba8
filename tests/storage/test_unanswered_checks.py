"""How long a task without a usable answer is checked: script and model agree."""

from __future__ import annotations

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service.domain.ledger import Balance, ReservationState
from service.domain.tasks import Kind
from service.usecases.ports import CheckOutcome
from tests.storage.ledger_comparison import ACCOUNTS
from tests.storage.ledger_machine import LedgerMachine
from tests.support.valkey import Valkey

RUNNING, NOT_FOUND, INVALID, NO_RESPONSE = (
    CheckOutcome.RUNNING,
    CheckOutcome.NOT_FOUND,
    CheckOutcome.INVALID,
    CheckOutcome.NO_RESPONSE,
)

answers = st.tuples(
    st.sampled_from([RUNNING, NOT_FOUND, NOT_FOUND, INVALID, INVALID, NO_RESPONSE]), st.sampled_from([1, 50_000])
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(reported=st.lists(answers, min_size=3, max_size=10))
@example(reported=[(INVALID, 50_000)] * 6)
@example(reported=[(NOT_FOUND, 50_000), (INVALID, 50_000)] * 3)
@example(
    reported=[
        (NOT_FOUND, 50_000),
        (NOT_FOUND, 50_000),
        (NO_RESPONSE, 1),
        (RUNNING, 1),
        (NOT_FOUND, 50_000),
        (NOT_FOUND, 50_000),
    ]
)
@example(reported=[(INVALID, 50_000)] * 4 + [(NO_RESPONSE, 50_000), (RUNNING, 1)] + [(INVALID, 50_000)] * 2)
@example(reported=[(INVALID, 50_000)] * 4 + [(NO_RESPONSE, 50_000)] * 2 + [(INVALID, 50_000)] * 2)
def test_give_up(valkey: Valkey, reported: list[tuple[CheckOutcome, int]]) -> None:
    """For any sequence of answers, a task ends at the same check with the same error on both sides."""
    machine = LedgerMachine(valkey.url)
    try:
        name = machine.reserve(Kind.UPSCALE, ACCOUNTS, None)
        assert name
        machine.settle(name, ReservationState.ACCEPTED, Balance())
        machine.advance_clock(machine.retention.check_interval_ms)
        (due,) = machine.run(machine.model.claim_checks(1))
        for answered, milliseconds in reported:
            machine.advance_clock(milliseconds)
            machine.record_check(due, answered)
    finally:
        machine.teardown()
