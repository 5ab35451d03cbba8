"""What is concluded from balances is never wrong, whatever the upstream does in whatever order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.ledger_model_machine import LedgerModelMachine


def test_balances() -> None:
    """No sequence makes the ledger suspect somebody, believe in what is not there, or spend what shall stay."""
    run_state_machine_as_test(
        LedgerModelMachine, settings=settings(max_examples=200, stateful_step_count=40, deadline=None)
    )
