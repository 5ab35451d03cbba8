"""Sequences that random runs of the ledger reach too rarely: script and model agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import example, given
from hypothesis import strategies as st

from service.domain.ledger import Balance, ReservationState
from service.domain.tasks import Kind
from service.domain.tenants import Limit, TenantPolicy, Window
from service.storage.redis import DAY_MS
from service.usecases.ports import CheckOutcome
from tests.storage.ledger_comparison import ACCOUNTS, TENANT
from tests.storage.ledger_machine import LedgerMachine
from tests.storage.ledger_strategies import KINDS, usual_plan
from tests.support.valkey import Valkey

RUNNING, NOT_FOUND, INVALID, NO_RESPONSE = (
    CheckOutcome.RUNNING,
    CheckOutcome.NOT_FOUND,
    CheckOutcome.INVALID,
    CheckOutcome.NO_RESPONSE,
)
ANSWERS = st.tuples(
    st.sampled_from([RUNNING, NOT_FOUND, NOT_FOUND, INVALID, INVALID, NO_RESPONSE]), st.sampled_from([1, 50_000])
)


@contextmanager
def run_machine(valkey: Valkey) -> Iterator[LedgerMachine]:
    machine = LedgerMachine(valkey.url)
    try:
        yield machine
    finally:
        machine.teardown()


@given(answers=st.lists(ANSWERS, min_size=3, max_size=10))
@example(answers=[(INVALID, 50_000)] * 6)
@example(answers=[(NOT_FOUND, 50_000), (INVALID, 50_000)] * 3)
@example(answers=[(NOT_FOUND, 50_000)] * 2 + [(NO_RESPONSE, 1), (RUNNING, 1)] + [(NOT_FOUND, 50_000)] * 2)
@example(answers=[(INVALID, 50_000)] * 4 + [(NO_RESPONSE, 50_000), (RUNNING, 1)] + [(INVALID, 50_000)] * 2)
@example(answers=[(INVALID, 50_000)] * 4 + [(NO_RESPONSE, 50_000)] * 2 + [(INVALID, 50_000)] * 2)
def test_unanswered_checks(valkey: Valkey, answers: list[tuple[CheckOutcome, int]]) -> None:
    """For any sequence of answers, a task ends at the same check with the same error on both sides."""
    with run_machine(valkey) as machine:
        name = machine.reserve(Kind.UPSCALE, ACCOUNTS, None)
        assert name
        machine.settle(name, ReservationState.ACCEPTED, Balance())
        machine.advance_clock(machine.retention.check_interval_ms)
        (due,) = machine.model.claim_checks(1)
        for answer, milliseconds in answers:
            machine.advance_clock(milliseconds)
            machine.record_check(due, answer)


@given(window=st.sampled_from(Window), remaining=st.integers(100, 250), price=st.integers(50, 400))
@example(window=Window.TOTAL, remaining=100, price=101)
@example(window=Window.MONTH, remaining=250, price=250)
def test_overrun(valkey: Valkey, window: Window, remaining: int, price: int) -> None:
    """A risen price is charged in full; the part beyond the limit counts as overrun."""
    with run_machine(valkey) as machine:
        machine.set_upstream(late=True, now=True, count=0, money=2_000)
        machine.advance_clock(3_600_000)
        machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0]), 1)
        machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0]), 1)
        spent = machine.tenant_state().windows[window].money_fen
        machine.write_tenant_policy(TenantPolicy((Limit(window, money_fen=spent + remaining),)))
        machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0])._replace(price_fen=price), 1)
        machine.stored_data_matches()
        counted = machine.tenant_state().windows[window]
        assert machine.upstream.balances[ACCOUNTS[0]] == Balance(0, 2_000 - 200 - price)
        assert (counted.money_fen, counted.overrun_fen) == (spent + price, max(price - remaining, 0))


def test_reset_after_steps_back_in_a_row(valkey: Valkey) -> None:
    """A reset also moves an unknown submission made on a day that is in the future by now."""
    with run_machine(valkey) as machine:
        machine.set_upstream(late=False, now=False, count=9, money=2_000)
        plan = usual_plan(KINDS[0])._replace(outcome=ReservationState.UNKNOWN, is_charged=True)
        machine.run_submission(ACCOUNTS[0], plan, 1)
        for _ in range(2):
            machine.step_clock_back(2 * DAY_MS, 0)
            machine.reset_clock((TENANT,))
            machine.stored_data_matches()
