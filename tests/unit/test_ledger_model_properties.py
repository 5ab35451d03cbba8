"""Conclusions from balances hold for any order of events."""

from __future__ import annotations

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.ledger_model_machine import LedgerModelMachine


def test_ledger_model() -> None:
    run_state_machine_as_test(
        LedgerModelMachine, settings=settings(max_examples=200, stateful_step_count=40, deadline=None)
    )
