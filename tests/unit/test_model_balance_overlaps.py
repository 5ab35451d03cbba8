"""Overlapping balances and floors in the ledger model."""

from __future__ import annotations

from typing import Any

import pytest

from service.domain import availability
from service.domain.availability import EXCLUSIVE_RETRY_MS, MAX_FAILED_BALANCE_CHECKS, PROBE_INTERVAL_MS, Availability
from service.domain.ledger import AccountState, AccountStatus, Balance, BalanceReading, FinishedTaskCheck, ReadingSource
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, SpendingMode
from tests.model import ledger_model

POLICY = AccountPolicy()
PRICED = AccountPolicy(floor_money_fen=200, max_price={Kind.UPSCALE: 300, Kind.SEAMLESS: 100})
NEWEST = FinishedTaskCheck("r1", sent_at=5, count=0, money_fen=0)


def make_account_state(count: int, money: int, **fields: Any) -> AccountState:
    figures = [BalanceReading(item, 10, 20, ReadingSource.CHECK) for item in (count, money)]
    return AccountState(count=figures[0], money=figures[1], **fields)


def is_payable(state: AccountState, policy: AccountPolicy, kind: Kind) -> bool:
    return (
        availability.account_availability(state, policy, SpendingMode.COUNT_THEN_MONEY, kind, 100)[0]
        is Availability.AVAILABLE
    )


@pytest.mark.parametrize(("rose", "unexplained"), [(20, 0), (14, 300)])
def test_response_from_before_an_increase(rose: int, unexplained: int) -> None:
    state = make_account_state(0, 900, last_increase_at=rose)
    ledger_model.observe_balance(state, POLICY, Balance(0, 600), ReadingSource.SUBMIT, sent_at=15, received_at=30)
    assert state.money == BalanceReading(600, 15, 30, ReadingSource.SUBMIT)
    assert state.unexplained_money_fen == unexplained


def test_increase_between_overlapping_responses() -> None:
    state = make_account_state(0, 600)
    ledger_model.observe_balance(state, POLICY, Balance(0, 900), ReadingSource.SUBMIT, sent_at=31, received_at=40)
    ledger_model.observe_balance(state, POLICY, Balance(0, 600), ReadingSource.SUBMIT, sent_at=30, received_at=50)
    assert state.unexplained_money_fen == 0
    ledger_model.observe_balance(state, POLICY, Balance(0, 500), ReadingSource.SUBMIT, sent_at=60, received_at=70)
    assert state.unexplained_money_fen == 100


def test_money_waits_for_prepaid_only_submissions() -> None:
    assert is_payable(make_account_state(1, 900, pending_charges=1), POLICY, Kind.UPSCALE)
    assert not is_payable(make_account_state(1, 900, pending_charges=1, pending_prepaid_only=1), POLICY, Kind.UPSCALE)


@pytest.mark.parametrize(("money", "kind", "enough"), [(500, Kind.UPSCALE, True), (499, Kind.UPSCALE, False)])
def test_money_floor(money: int, kind: Kind, *, enough: bool) -> None:
    assert is_payable(make_account_state(0, money), PRICED, kind) is enough


def test_money_floor_with_a_more_expensive_task_unsettled() -> None:
    assert is_payable(make_account_state(0, 700), PRICED, Kind.SEAMLESS)
    assert not is_payable(make_account_state(0, 700, pending_charges=1), PRICED, Kind.SEAMLESS)
    assert is_payable(make_account_state(0, 800, pending_charges=1), PRICED, Kind.SEAMLESS)


def test_count_floor_delays_money_payment() -> None:
    policy = AccountPolicy(floor_count=2)
    assert is_payable(make_account_state(0, 900, pending_charges=1), policy, Kind.UPSCALE)
    assert not is_payable(make_account_state(1, 900, pending_charges=1), policy, Kind.UPSCALE)


def test_retry_at_the_next_balance_check() -> None:
    state = make_account_state(0, 400, live_balance_checks=True, last_balance_check_at=90)
    state.last_finished_task = NEWEST
    assert ledger_model.is_balance_check_due(state, PRICED, 90 + PROBE_INTERVAL_MS, count_only=False)
    result = availability.account_availability(state, PRICED, SpendingMode.COUNT_THEN_MONEY, Kind.UPSCALE, 100)
    assert result == (Availability.EXHAUSTED, 90 + PROBE_INTERVAL_MS)
    state.open_submissions = state.pending_charges = 1
    assert not ledger_model.is_balance_check_due(state, PRICED, 90 + PROBE_INTERVAL_MS, count_only=False)
    result = availability.account_availability(state, PRICED, SpendingMode.COUNT_THEN_MONEY, Kind.UPSCALE, 100)
    assert result == (Availability.EXHAUSTED, 100 + EXCLUSIVE_RETRY_MS)


def test_probes_resume_after_failed_balance_checks() -> None:
    state = AccountState(status=AccountStatus.EXHAUSTED, live_balance_checks=True, last_finished_task=NEWEST)
    for _ in range(MAX_FAILED_BALANCE_CHECKS):
        assert (
            availability.account_availability(state, POLICY, SpendingMode.COUNT_THEN_MONEY, Kind.UPSCALE, 100)[0]
            is Availability.EXHAUSTED
        )
        ledger_model.start_balance_check(state, 0)
    assert (
        availability.account_availability(state, POLICY, SpendingMode.COUNT_THEN_MONEY, Kind.UPSCALE, 100)[0]
        is Availability.PROBE
    )
    ledger_model.record_balance_check(state, POLICY, "r1", Balance(0, 0), sent_at=50, received_at=60)
    assert (
        availability.account_availability(state, POLICY, SpendingMode.COUNT_THEN_MONEY, Kind.UPSCALE, 100)[0]
        is Availability.EXHAUSTED
    )
