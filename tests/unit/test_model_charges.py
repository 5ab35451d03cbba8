"""Charges in the ledger model."""

from __future__ import annotations

from typing import Any

import pytest

from service.domain.ledger import AccountState, Balance, BalanceSnapshot, Reservation, ReservationState
from service.domain.tasks import Cost, CostBasis, Kind
from service.domain.tenants import AccountPolicy
from tests.model import ledger_model

POLICY = AccountPolicy()
NOW = 1_790_000_000_000
KIND = Kind.SEAMLESS


def make_reservation(before: BalanceSnapshot | None = None, *, alone: bool = True, **fields: Any) -> Reservation:
    """Make a submission sent with an exact balance."""
    return Reservation(
        ReservationState.ACCEPTED,
        tenant=1,
        account=1,
        kind=KIND,
        created_at=NOW,
        dispatched_at=NOW,
        lease_expires_at=NOW,
        balance_before=before,
        exclusive=alone,
        balance_exact=True,
        **fields,
    )


def compute_cost(
    state: AccountState,
    reservation: Reservation,
    figures: Balance,
    *,
    policy: AccountPolicy = POLICY,
    succeeded: bool = True,
) -> Cost:
    return ledger_model.compute_cost(state, policy, reservation, figures, succeeded=succeeded)


def test_exclusive_task_costs_the_balance_drop() -> None:
    state = AccountState()
    assert compute_cost(state, make_reservation(BalanceSnapshot(0, 900)), Balance(0, 650)) == Cost(
        0, 250, CostBasis.OBSERVED
    )
    assert (state.last_price[KIND], state.max_observed_price[KIND]) == (250, 250)
    compute_cost(state, make_reservation(BalanceSnapshot(0, 650)), Balance(0, 550))
    assert (state.last_price[KIND], state.max_observed_price[KIND]) == (100, 250)


@pytest.mark.parametrize(
    ("before", "after", "alone"),
    [
        (BalanceSnapshot(0, 900), Balance(0, 650), False),
        (None, Balance(0, 650), True),
        (BalanceSnapshot(0, 900), Balance(0, None), True),
        (BalanceSnapshot(0, 900), Balance(0, 950), True),
        (BalanceSnapshot(3, 900), Balance(0, 900), True),
    ],
)
def test_estimated_cost_is_the_last_price(before: BalanceSnapshot | None, after: Balance, *, alone: bool) -> None:
    state = AccountState(last_price={KIND: 70})
    assert compute_cost(state, make_reservation(before, alone=alone), after) == Cost(0, 70, CostBasis.ESTIMATED)


def test_inexact_balance_gives_no_observed_cost() -> None:
    reservation = make_reservation(BalanceSnapshot(0, 900))
    reservation.balance_exact = False
    assert compute_cost(AccountState(last_price={KIND: 70}), reservation, Balance(0, 650)) == Cost(
        0, 70, CostBasis.ESTIMATED
    )


@pytest.mark.parametrize(
    ("use", "left", "cost"), [(True, 0, (1, 0)), (None, 4, (1, 0)), (None, 0, (0, 70)), (False, 4, (0, 70))]
)
def test_cost_of_a_prepaid_use(use: bool | None, left: int, cost: tuple[int, int]) -> None:
    reservation = make_reservation(alone=False, expects_prepaid=use)
    assert compute_cost(AccountState(last_price={KIND: 70}), reservation, Balance(left, 100)) == Cost(
        *cost, CostBasis.ESTIMATED
    )


def test_cost_without_balance_or_price() -> None:
    assert compute_cost(AccountState(), make_reservation(), Balance()) == Cost(0, 0, CostBasis.UNKNOWN)
    free = compute_cost(AccountState(), make_reservation(BalanceSnapshot(2, 0)), Balance(2, 0), succeeded=False)
    assert free == Cost(0, 0, CostBasis.OBSERVED)


@pytest.mark.parametrize(("late", "charged"), [(False, 80), (None, 80), (True, 70)])
def test_cost_of_a_failed_task(late: bool | None, charged: int) -> None:
    state = AccountState(last_price={KIND: 70}, charges_on_completion=late)
    reservation = make_reservation(BalanceSnapshot(0, 900), balance_after=Balance(0, 820))
    assert compute_cost(state, reservation, Balance(), succeeded=False) == Cost(0, charged, CostBasis.ESTIMATED)
    assert compute_cost(state, reservation, Balance(0, 820), succeeded=False) == Cost(0, 80, CostBasis.OBSERVED)


def test_cost_of_a_failed_task_without_balance() -> None:
    reservation = make_reservation(BalanceSnapshot(0, 900), balance_after=Balance(0, 900))
    state = AccountState(last_price={KIND: 70})
    assert compute_cost(state, reservation, Balance(), succeeded=False) == Cost(0, 70, CostBasis.ESTIMATED)


def test_drop_above_the_highest_price_is_not_the_cost() -> None:
    state, policy = AccountState(), AccountPolicy(max_price={KIND: 300})
    cost = compute_cost(state, make_reservation(BalanceSnapshot(0, 900)), Balance(0, 400), policy=policy)
    assert cost == Cost(0, 300, CostBasis.ESTIMATED)
    assert state.max_observed_price == {}


def test_charge_timing_is_learned() -> None:
    state = AccountState()
    ledger_model.learn_charge_timing(state, make_reservation(BalanceSnapshot(0, 1_200), alone=False), Balance(0, 1_200))
    assert state.charges_on_completion is True
    ledger_model.learn_charge_timing(state, make_reservation(BalanceSnapshot(0, 1_200), alone=False), Balance(0, 1_100))
    assert state.charges_on_completion is True
    ledger_model.learn_charge_timing(
        state, make_reservation(BalanceSnapshot(0, 1_200), expects_prepaid=False), Balance(0, 1_100)
    )
    assert state.charges_on_completion is False


@pytest.mark.parametrize(("use", "after"), [(True, Balance(3, 1_100)), (False, Balance(2, 1_200))])
def test_unrelated_drop_reveals_no_charge_timing(use: bool, after: Balance) -> None:
    state = AccountState()
    ledger_model.learn_charge_timing(state, make_reservation(BalanceSnapshot(3, 1_200), expects_prepaid=use), after)
    assert state.charges_on_completion is None


def test_response_from_before_a_reopening_is_missing_from_the_balance() -> None:
    state, reservation = (
        AccountState(pending_charges=1, reopened_at=NOW + 1, charges_on_completion=False),
        make_reservation(charge_pending=True),
    )
    ledger_model.learn_charge_timing(state, reservation, Balance(3, 0))
    assert state.unaccounted_charges == 1
    ledger_model.finish_charge(state, reservation, Balance(3, 0), NOW, NOW + 5)
    assert (state.unaccounted_charges, state.untracked_until) == (1, NOW + 5)


@pytest.mark.parametrize(
    ("tasks", "drops", "unexplained"),
    [
        (1, [(1, 0)], (0, 0)),
        (1, [(3, 0)], (2, 0)),
        (1, [(0, 300)], (0, 0)),
        (1, [(0, 700)], (0, 400)),
        (1, [(1, 700)], (0, 700)),
        (1, [(0, 200), (1, 0)], (0, 200)),
        (2, [(0, 200), (1, 0)], (0, 0)),
        (2, [(1, 100), (1, 100)], (0, 200)),
        (0, [(1, 100)], (1, 100)),
    ],
)
def test_drop_is_attributed_to_tasks_up_to_their_price(
    tasks: int, drops: list[tuple[int, int]], unexplained: tuple[int, int]
) -> None:
    state, policy = AccountState(), AccountPolicy(max_price={KIND: 300})
    for _ in range(tasks):
        ledger_model.add_expected_charge(state, policy, KIND, 1)
    for drop in drops:
        ledger_model.attribute_drop(state, *drop)
    assert (state.unexplained_count, state.unexplained_money_fen) == unexplained


@pytest.mark.parametrize(("caught_up", "unexplained"), [(NOW + 5, 0), (0, 1)])
def test_late_refusal_cancels_the_expected_charge(caught_up: int, unexplained: int) -> None:
    state, late = (
        AccountState(pending_charges=1, untracked_charges=1, reconciled_at=caught_up),
        make_reservation(charge_pending=True, settled_at=NOW),
    )
    ledger_model.add_expected_charge(state, POLICY, KIND, 1)
    ledger_model.cancel_expected_charge(state, POLICY, late, still_expected=ledger_model.resolve_untracked(state, late))
    ledger_model.attribute_drop(state, 1, 0)
    assert state.unexplained_count == unexplained


def test_any_drop_is_attributed_without_a_price() -> None:
    state = AccountState()
    ledger_model.add_expected_charge(state, POLICY, KIND, 1)
    ledger_model.attribute_drop(state, 0, 5_000)
    assert state.unexplained_money_fen == 0
