"""The Lua scripts agree with the model for any sequence of calls."""

from __future__ import annotations

from typing import cast

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from service.domain.ledger import ReservationState
from service.domain.tenants import Limit, TenantPolicy, Window
from service.usecases.ports import CheckOutcome
from tests.storage.ledger_comparison import ACCOUNTS
from tests.storage.ledger_machine import LedgerMachine
from tests.storage.ledger_strategies import KINDS, usual_plan
from tests.support.valkey import Valkey


def test_scripts_and_model(valkey: Valkey) -> None:
    run_state_machine_as_test(
        cast("type[RuleBasedStateMachine]", lambda: LedgerMachine(valkey.url)),
        settings=settings(suppress_health_check=list(HealthCheck)),
    )


def test_overrun_of_each_task_is_at_most_its_cost(valkey: Valkey) -> None:
    machine = LedgerMachine(valkey.url)
    try:
        machine.set_upstream(late=False, now=True, count=0, money=2_000)
        for _ in range(2):  # the second shows the price
            machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0]), 1)
        for name in [machine.reserve(KINDS[0], ACCOUNTS[:1], None) for _ in range(2)]:
            assert name
            machine.settle(name, ReservationState.ACCEPTED, None)
        spent = machine.tenant_state().windows[Window.TOTAL].money_fen
        machine.write_tenant_policy(TenantPolicy((Limit(Window.TOTAL, money_fen=spent + 50),)))
        machine.advance_clock(machine.retention.check_interval_ms)
        machine.claim_checks(9)
        for due in [*machine.claimed_checks]:
            machine.record_check(due, CheckOutcome.SUCCEEDED)
        machine.stored_data_matches()
        counter = machine.tenant_state().windows[Window.TOTAL]
        assert counter.overrun_fen == counter.money_fen - spent - 50 == 150
    finally:
        machine.teardown()
