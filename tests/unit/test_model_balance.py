"""Balances in the ledger model."""

from __future__ import annotations

import pytest

from service.domain import availability
from service.domain.availability import PROBE_INTERVAL_MS, Availability
from service.domain.ledger import AccountState, AccountStatus, Balance, BalanceReading, ReadingSource
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, SpendingMode
from tests.model import ledger_model

POLICY = AccountPolicy()
MONEY = SpendingMode.COUNT_THEN_MONEY


def make_account_state(
    count: int | None = None, money: int | None = None, sent: int = 10, received: int = 20
) -> AccountState:
    return AccountState(
        count=None if count is None else BalanceReading(count, sent, received, ReadingSource.CHECK),
        money=None if money is None else BalanceReading(money, sent, received, ReadingSource.CHECK),
    )


def check_availability(
    state: AccountState, *, mode: SpendingMode = MONEY, policy: AccountPolicy = POLICY, now: int = 100
) -> Availability:
    return availability.account_availability(state, policy, mode, Kind.UPSCALE, now)[0]


def test_later_balance_replaces() -> None:
    state = make_account_state(count=5, money=100)
    ledger_model.observe_balance(state, POLICY, Balance(7, 50), ReadingSource.CHECK, sent_at=21, received_at=30)
    assert (state.count, state.money) == (
        BalanceReading(7, 21, 30, ReadingSource.CHECK),
        BalanceReading(50, 21, 30, ReadingSource.CHECK),
    )


def test_overlapping_balance_only_lowers() -> None:
    state = make_account_state(count=5, money=100)
    ledger_model.observe_balance(state, POLICY, Balance(7, 50), ReadingSource.CHECK, sent_at=15, received_at=30)
    assert state.count == BalanceReading(5, 10, 20, ReadingSource.CHECK)
    assert state.money == BalanceReading(50, 15, 30, ReadingSource.CHECK)


def test_missing_balance_changes_nothing() -> None:
    state = make_account_state(count=5)
    ledger_model.observe_balance(state, POLICY, Balance(), ReadingSource.CHECK, sent_at=30, received_at=40)
    assert (state.count, state.money) == (BalanceReading(5, 10, 20, ReadingSource.CHECK), None)


def test_floor_closes_the_account() -> None:
    state = make_account_state()
    ledger_model.observe_balance(
        state,
        AccountPolicy(floor_count=2, floor_money_fen=100),
        Balance(2, 100),
        ReadingSource.CHECK,
        sent_at=30,
        received_at=40,
    )
    assert (state.status, state.next_probe_at) == (AccountStatus.EXHAUSTED, 40 + PROBE_INTERVAL_MS)


def test_increase_reopens_the_account() -> None:
    state = make_account_state(count=0, money=0)
    state.status = AccountStatus.EXHAUSTED
    ledger_model.observe_balance(state, POLICY, Balance(0, 0), ReadingSource.CHECK, sent_at=30, received_at=40)
    assert state.status is AccountStatus.EXHAUSTED
    ledger_model.observe_balance(state, POLICY, Balance(0, 500), ReadingSource.CHECK, sent_at=50, received_at=60)
    assert check_availability(state) is Availability.AVAILABLE


def test_outdated_refusal_closes_nothing() -> None:
    state = make_account_state(count=5, sent=10)
    ledger_model.close_on_refusal(state, AccountStatus.EXHAUSTED, sent_at=9, received_at=30)
    assert check_availability(state) is Availability.AVAILABLE
    ledger_model.close_on_refusal(state, AccountStatus.EXHAUSTED, sent_at=10, received_at=30)
    assert state.status is AccountStatus.EXHAUSTED


def test_outdated_acceptance_opens_nothing() -> None:
    state = make_account_state()
    ledger_model.close_on_refusal(state, AccountStatus.INVALID, sent_at=50, received_at=60)
    ledger_model.open_on_acceptance(state, sent_at=50)
    assert check_availability(state) is Availability.INVALID
    ledger_model.open_on_acceptance(state, sent_at=51)
    assert state.status is AccountStatus.OPEN


def test_probes_are_limited() -> None:
    """One per interval, and none for a prepaid-only tenant."""
    state = make_account_state(count=0, money=0)
    ledger_model.close_on_refusal(state, AccountStatus.EXHAUSTED, sent_at=50, received_at=60)
    assert check_availability(state, now=60) is Availability.EXHAUSTED
    assert check_availability(state, now=60 + PROBE_INTERVAL_MS) is Availability.PROBE
    assert check_availability(state, now=60 + PROBE_INTERVAL_MS, mode=SpendingMode.COUNT_ONLY) is Availability.EXHAUSTED


def test_no_probe_below_a_floor() -> None:
    state = make_account_state(count=0, money=300)
    policy = AccountPolicy(floor_money_fen=300)
    ledger_model.close_on_refusal(state, AccountStatus.EXHAUSTED, sent_at=50, received_at=60)
    assert check_availability(state, policy=policy, now=60 + PROBE_INTERVAL_MS) is Availability.EXHAUSTED


def test_prepaid_only_needs_a_use_per_open_submission() -> None:
    assert check_availability(make_account_state(count=1), mode=SpendingMode.COUNT_ONLY) is Availability.AVAILABLE
    one_open = make_account_state(count=1)
    one_open.open_submissions = 1
    assert check_availability(one_open, mode=SpendingMode.COUNT_ONLY) is Availability.EXHAUSTED
    assert check_availability(AccountState(), mode=SpendingMode.COUNT_ONLY) is Availability.AVAILABLE
    assert check_availability(AccountState(open_submissions=1), mode=SpendingMode.COUNT_ONLY) is Availability.EXHAUSTED


def test_unsettled_submissions_count_against_the_balance() -> None:
    state = make_account_state(count=1, money=500)
    state.max_observed_price[Kind.UPSCALE] = 300
    state.pending_charges = 2
    assert check_availability(state) is Availability.AVAILABLE
    state.pending_charges = 3
    assert check_availability(state) is Availability.EXHAUSTED


def test_unknown_balance_lets_submissions_through() -> None:
    assert check_availability(AccountState()) is Availability.AVAILABLE
    assert check_availability(make_account_state(count=0)) is Availability.AVAILABLE


@pytest.mark.parametrize(
    ("count", "is_open", "max_price", "highest", "held"),
    [
        (3, 2, {}, {}, 0),
        (3, 3, {Kind.UPSCALE: 250}, {Kind.UPSCALE: 100}, 250),
        (None, 0, {}, {Kind.UPSCALE: 100}, 100),
        (0, 0, {}, {}, None),
    ],
)
def test_money_hold(
    count: int | None, is_open: int, max_price: dict[Kind, int], highest: dict[Kind, int], held: int | None
) -> None:
    state = make_account_state(count=count)
    state.open_submissions, state.max_observed_price = is_open, highest
    assert ledger_model.price_hold(state, AccountPolicy(max_price=max_price), Kind.UPSCALE) == held


def test_count_floor_blocks_money_payment() -> None:
    """The upstream would spend the uses first."""
    policy = AccountPolicy(floor_count=5)
    assert check_availability(make_account_state(count=6, money=10_000), policy=policy) is Availability.AVAILABLE
    assert check_availability(make_account_state(count=4, money=10_000), policy=policy) is Availability.EXHAUSTED
    assert check_availability(make_account_state(count=0, money=10_000), policy=policy) is Availability.AVAILABLE


def test_responses_from_before_a_reopening_are_ignored() -> None:
    state = AccountState(reopened_at=100)
    ledger_model.close_on_refusal(state, AccountStatus.INVALID, sent_at=99, received_at=150)
    ledger_model.observe_balance(state, POLICY, Balance(0, 0), ReadingSource.SUBMIT, sent_at=99, received_at=150)
    assert (state.status, state.count, state.money) == (AccountStatus.OPEN, None, None)
    ledger_model.close_on_refusal(state, AccountStatus.INVALID, sent_at=100, received_at=150)
    assert check_availability(state) is Availability.INVALID
