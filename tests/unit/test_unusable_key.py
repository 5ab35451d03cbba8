"""An account whose key can't be opened is the operators' to mend, and stands in nobody's way."""

from __future__ import annotations

import pytest

from service.domain.errors import AccountMisconfigured
from service.domain.ledger import Status
from service.usecases.ports import SubmitOutcome, Submitted
from tests.unit.over_fakes import Gateway

MISCONFIGURED = Submitted(outcome=SubmitOutcome.MISCONFIGURED)


async def test_next_account() -> None:
    """The next account is tried, and the first stays open for when its key is back."""
    gateway = Gateway()
    gateway.upstream.next_submits.append(MISCONFIGURED)
    await gateway.submitted()
    assert [name for name, _, _ in gateway.upstream.submits] == ["main", "spare"]
    assert gateway.places == (1, 0, 1)
    assert gateway.ledger.account_states[2].status is Status.OPEN


async def test_no_account_left() -> None:
    """Where no account is left, the caller is told that operators have to act, and nothing is charged or closed."""
    gateway = Gateway()
    gateway.upstream.next_submits += [MISCONFIGURED] * 2
    with pytest.raises(AccountMisconfigured):
        await gateway.submitted()
    assert gateway.places == (0, 0, 0)
    assert {state.status for state in gateway.ledger.account_states.values()} == {Status.OPEN}
