"""Accounts whose key cannot be decrypted."""

from __future__ import annotations

import pytest

from service.domain.errors import AccountMisconfigured
from service.domain.ledger import AccountStatus
from service.usecases.ports import SubmitOutcome, SubmitResult
from tests.unit.fake_gateway import FakeGateway

MISCONFIGURED = SubmitResult(outcome=SubmitOutcome.MISCONFIGURED)


async def test_next_account_is_used() -> None:
    gateway = FakeGateway()
    gateway.upstream.next_submits.append(MISCONFIGURED)
    await gateway.submit_image()
    assert [name for name, _, _ in gateway.upstream.submits] == ["main", "spare"]
    assert gateway.task_counts == (1, 0, 1)
    assert gateway.ledger.states_by_account[2].status is AccountStatus.OPEN


async def test_no_other_account() -> None:
    gateway = FakeGateway()
    gateway.upstream.next_submits += [MISCONFIGURED] * 2
    with pytest.raises(AccountMisconfigured):
        await gateway.submit_image()
    assert gateway.task_counts == (0, 0, 0)
    assert {state.status for state in gateway.ledger.states_by_account.values()} == {AccountStatus.OPEN}
