"""The Lua scripts on a real server do what the pure functions of the domain say, whatever happens in whatever order."""

from __future__ import annotations

from typing import cast

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.storage.delivery_machine import DeliveryMachine
from tests.support.valkey import Valkey


def test_scripts_do_what_the_model_says(valkey: Valkey) -> None:
    """Every sequence of calls gives the same answers and leaves the same state in Redis and in the model."""
    run_state_machine_as_test(
        cast("type[RuleBasedStateMachine]", lambda: DeliveryMachine(valkey.url)),
        settings=settings(
            max_examples=80,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
