"""How long a task is waited for of which nothing usable is told: the script and the model agree on every sequence."""

from __future__ import annotations

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service.domain.ledger import Figures, ReservationState
from service.domain.tasks import Kind
from service.usecases.ports import Answered
from tests.storage.ledger_machine import LedgerMachine
from tests.storage.ledger_pair import ACCOUNTS
from tests.support.valkey import Valkey

RUNNING, SILENT, UNUSABLE, NOTHING = Answered.RUNNING, Answered.SILENT, Answered.UNUSABLE, Answered.NOTHING

answers = st.tuples(
    st.sampled_from([RUNNING, SILENT, SILENT, UNUSABLE, UNUSABLE, NOTHING]), st.sampled_from([1, 50_000])
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(told=st.lists(answers, min_size=3, max_size=10))
@example(told=[(UNUSABLE, 50_000)] * 6)
@example(told=[(SILENT, 50_000), (UNUSABLE, 50_000)] * 3)
@example(told=[(SILENT, 50_000), (SILENT, 50_000), (NOTHING, 1), (RUNNING, 1), (SILENT, 50_000), (SILENT, 50_000)])
@example(told=[(UNUSABLE, 50_000)] * 4 + [(NOTHING, 50_000), (RUNNING, 1)] + [(UNUSABLE, 50_000)] * 2)
@example(told=[(UNUSABLE, 50_000)] * 4 + [(NOTHING, 50_000)] * 2 + [(UNUSABLE, 50_000)] * 2)
def test_patience(valkey: Valkey, told: list[tuple[Answered, int]]) -> None:
    """Whatever is answered when, a task ends at the same check in Redis as in the model, with the same error."""
    machine = LedgerMachine(valkey.url)
    try:
        name = machine.reserve(Kind.UPSCALE, ACCOUNTS, None)
        assert name
        machine.settle(name, ReservationState.ACCEPTED, Figures())
        machine.wait(machine.spans.check_after)
        (due,) = machine.run(machine.model.claim(1))
        for answered, milliseconds in told:
            machine.wait(milliseconds)
            machine.record(due, answered)
    finally:
        machine.teardown()
