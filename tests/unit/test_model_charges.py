"""What an account is found to have been charged for."""

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
    """A submission that was sent while these figures were known, and lacked nothing."""
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


def test_observed_receipt() -> None:
    """A task that was alone on the account cost what the balance dropped, and its price is remembered."""
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
def test_estimated_receipt(before: BalanceSnapshot | None, after: Balance, *, alone: bool) -> None:
    """Without a drop that only this task can have caused, the last price seen is taken."""
    state = AccountState(last_price={KIND: 70})
    assert compute_cost(state, make_reservation(before, alone=alone), after) == Cost(0, 70, CostBasis.ESTIMATED)


def test_receipt_where_the_figures_lacked_something() -> None:
    """A drop that may be another's too is no receipt."""
    reservation = make_reservation(BalanceSnapshot(0, 900))
    reservation.balance_exact = False
    assert compute_cost(AccountState(last_price={KIND: 70}), reservation, Balance(0, 650)) == Cost(
        0, 70, CostBasis.ESTIMATED
    )


@pytest.mark.parametrize(
    ("use", "left", "cost"), [(True, 0, (1, 0)), (None, 4, (1, 0)), (None, 0, (0, 70)), (False, 4, (0, 70))]
)
def test_receipt_of_a_use(use: bool | None, left: int, cost: tuple[int, int]) -> None:
    """A task that was to take a use took one; where nobody knew, the uses that are left decide."""
    reservation = make_reservation(alone=False, use=use)
    assert compute_cost(AccountState(last_price={KIND: 70}), reservation, Balance(left, 100)) == Cost(
        *cost, CostBasis.ESTIMATED
    )


def test_receipt_of_nothing() -> None:
    """Without any figure or price the cost is unknown; a failed task that moved nothing cost nothing."""
    assert compute_cost(AccountState(), make_reservation(), Balance()) == Cost(0, 0, CostBasis.UNKNOWN)
    free = compute_cost(AccountState(), make_reservation(BalanceSnapshot(2, 0)), Balance(2, 0), succeeded=False)
    assert free == Cost(0, 0, CostBasis.OBSERVED)


@pytest.mark.parametrize(("late", "taken"), [(False, 80), (None, 80), (True, 70)])
def test_receipt_of_a_failure(late: bool | None, taken: int) -> None:
    """What a failed task took shows in the answer to its submission only where that is charged; it is an estimate."""
    state = AccountState(last_price={KIND: 70}, charges_on_completion=late)
    reservation = make_reservation(BalanceSnapshot(0, 900), after=Balance(0, 820))
    assert compute_cost(state, reservation, Balance(), succeeded=False) == Cost(0, taken, CostBasis.ESTIMATED)
    assert compute_cost(state, reservation, Balance(0, 820), succeeded=False) == Cost(0, 80, CostBasis.OBSERVED)


def test_receipt_of_a_failure_without_figures() -> None:
    """A failed task whose submission took nothing yet stays charged: no balance was seen after its end."""
    reservation = make_reservation(BalanceSnapshot(0, 900), after=Balance(0, 900))
    state = AccountState(last_price={KIND: 70})
    assert compute_cost(state, reservation, Balance(), succeeded=False) == Cost(0, 70, CostBasis.ESTIMATED)


def test_receipt_above_the_highest_price() -> None:
    """A drop that no task of this kind can cause is somebody else's spending: the operator's price is the guess."""
    state, policy = AccountState(), AccountPolicy(max_price={KIND: 300})
    cost = compute_cost(state, make_reservation(BalanceSnapshot(0, 900)), Balance(0, 400), policy=policy)
    assert cost == Cost(0, 300, CostBasis.ESTIMATED)
    assert state.max_observed_price == {}


def test_when_the_upstream_charges() -> None:
    """A submit that leaves the balance as it was is charged later; a lone one that does not, at once."""
    state = AccountState()
    ledger_model.learn_charge_timing(state, make_reservation(BalanceSnapshot(0, 1_200), alone=False), Balance(0, 1_200))
    assert state.charges_on_completion is True
    ledger_model.learn_charge_timing(state, make_reservation(BalanceSnapshot(0, 1_200), alone=False), Balance(0, 1_100))
    assert state.charges_on_completion is True
    ledger_model.learn_charge_timing(state, make_reservation(BalanceSnapshot(0, 1_200), use=False), Balance(0, 1_100))
    assert state.charges_on_completion is False


@pytest.mark.parametrize(("use", "after"), [(True, Balance(3, 1_100)), (False, Balance(2, 1_200))])
def test_drop_that_is_not_its_own(use: bool, after: Balance) -> None:
    """A submit that was to take the one tells nothing of when it is charged where the other dropped."""
    state = AccountState()
    ledger_model.learn_charge_timing(state, make_reservation(BalanceSnapshot(3, 1_200), use=use), after)
    assert state.charges_on_completion is None


def test_answer_from_before_a_reopening() -> None:
    """What was sent before an operator had the account tried again is missing in the figures that are known since."""
    state, reservation = (
        AccountState(pending_charges=1, reopened_at=NOW + 1, charges_on_completion=False),
        make_reservation(owes=True),
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
def test_drops(tasks: int, drops: list[tuple[int, int]], unexplained: tuple[int, int]) -> None:
    """Each task takes a use or money up to its price, never both; what is beyond that was taken by somebody else."""
    state, policy = AccountState(), AccountPolicy(max_price={KIND: 300})
    for _ in range(tasks):
        ledger_model.add_expected_charge(state, policy, KIND, 1)
    for drop in drops:
        ledger_model.attribute_drop(state, *drop)
    assert (state.unexplained_count, state.unexplained_money_fen) == unexplained


@pytest.mark.parametrize(("caught_up", "unexplained"), [(NOW + 5, 0), (0, 1)])
def test_late_refusal(caught_up: int, unexplained: int) -> None:
    """A late refusal takes off what is expected only if the figures had not shown by then that nothing was taken."""
    state, late = (
        AccountState(pending_charges=1, untracked_charges=1, reconciled_at=caught_up),
        make_reservation(owes=True, settled=NOW),
    )
    ledger_model.add_expected_charge(state, POLICY, KIND, 1)
    ledger_model.cancel_expected_charge(state, POLICY, late, still_expected=ledger_model.resolve_untracked(state, late))
    ledger_model.attribute_drop(state, 1, 0)
    assert state.unexplained_count == unexplained


def test_no_price_is_known() -> None:
    """Without a highest price any drop of the money may be the gateway's own."""
    state = AccountState()
    ledger_model.add_expected_charge(state, POLICY, KIND, 1)
    ledger_model.attribute_drop(state, 0, 5_000)
    assert state.unexplained_money_fen == 0
