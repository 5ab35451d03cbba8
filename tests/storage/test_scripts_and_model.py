"""The Lua scripts agree with the model for any sequence of calls."""

from __future__ import annotations

from typing import cast

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.storage.ledger_machine import LedgerMachine
from tests.support.valkey import Valkey


def test_scripts_and_model(valkey: Valkey) -> None:
    run_state_machine_as_test(
        cast("type[RuleBasedStateMachine]", lambda: LedgerMachine(valkey.url)),
        settings=settings(suppress_health_check=list(HealthCheck)),
    )
