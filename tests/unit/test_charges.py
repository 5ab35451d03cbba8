"""What an account is found to have been charged for."""

from __future__ import annotations

from typing import Any

import pytest

from service.domain.ledger import AccountState, Before, Figures, Reservation, ReservationState
from service.domain.tasks import Basis, Cost, Kind
from service.domain.tenants import AccountPolicy
from tests.model import ledger_model

POLICY = AccountPolicy()
NOW = 1_790_000_000_000
KIND = Kind.SEAMLESS


def sent(before: Before | None = None, *, alone: bool = True, **fields: Any) -> Reservation:
    """A submission that was sent while these figures were known, and lacked nothing."""
    return Reservation(
        ReservationState.ACCEPTED,
        tenant=1,
        account=1,
        kind=KIND,
        created=NOW,
        sent=NOW,
        lease=NOW,
        before=before,
        alone=alone,
        clean=True,
        **fields,
    )


def receipt(
    state: AccountState,
    reservation: Reservation,
    figures: Figures,
    *,
    policy: AccountPolicy = POLICY,
    succeeded: bool = True,
) -> Cost:
    return ledger_model.receipt(state, policy, reservation, figures, succeeded=succeeded)


def test_observed_receipt() -> None:
    """A task that was alone on the account cost what the balance dropped, and its price is remembered."""
    state = AccountState()
    assert receipt(state, sent(Before(0, 900)), Figures(0, 650)) == Cost(0, 250, Basis.OBSERVED)
    assert (state.prices[KIND], state.highest[KIND]) == (250, 250)
    receipt(state, sent(Before(0, 650)), Figures(0, 550))
    assert (state.prices[KIND], state.highest[KIND]) == (100, 250)


@pytest.mark.parametrize(
    ("before", "after", "alone"),
    [
        (Before(0, 900), Figures(0, 650), False),
        (None, Figures(0, 650), True),
        (Before(0, 900), Figures(0, None), True),
        (Before(0, 900), Figures(0, 950), True),
        (Before(3, 900), Figures(0, 900), True),
    ],
)
def test_estimated_receipt(before: Before | None, after: Figures, *, alone: bool) -> None:
    """Without a drop that only this task can have caused, the last price seen is taken."""
    state = AccountState(prices={KIND: 70})
    assert receipt(state, sent(before, alone=alone), after) == Cost(0, 70, Basis.ESTIMATED)


def test_receipt_where_the_figures_lacked_something() -> None:
    """A drop that may be another's too is no receipt."""
    reservation = sent(Before(0, 900))
    reservation.clean = False
    assert receipt(AccountState(prices={KIND: 70}), reservation, Figures(0, 650)) == Cost(0, 70, Basis.ESTIMATED)


@pytest.mark.parametrize(
    ("use", "left", "cost"), [(True, 0, (1, 0)), (None, 4, (1, 0)), (None, 0, (0, 70)), (False, 4, (0, 70))]
)
def test_receipt_of_a_use(use: bool | None, left: int, cost: tuple[int, int]) -> None:
    """A task that was to take a use took one; where nobody knew, the uses that are left decide."""
    reservation = sent(alone=False, use=use)
    assert receipt(AccountState(prices={KIND: 70}), reservation, Figures(left, 100)) == Cost(*cost, Basis.ESTIMATED)


def test_receipt_of_nothing() -> None:
    """Without any figure or price the cost is unknown; a failed task that moved nothing cost nothing."""
    assert receipt(AccountState(), sent(), Figures()) == Cost(0, 0, Basis.UNKNOWN)
    free = receipt(AccountState(), sent(Before(2, 0)), Figures(2, 0), succeeded=False)
    assert free == Cost(0, 0, Basis.OBSERVED)


@pytest.mark.parametrize(("late", "taken"), [(False, 80), (None, 80), (True, 70)])
def test_receipt_of_a_failure(late: bool | None, taken: int) -> None:
    """What a failed task took shows in the answer to its submission only where that is charged; it is an estimate."""
    state = AccountState(prices={KIND: 70}, charged_late=late)
    reservation = sent(Before(0, 900), after=Figures(0, 820))
    assert receipt(state, reservation, Figures(), succeeded=False) == Cost(0, taken, Basis.ESTIMATED)
    assert receipt(state, reservation, Figures(0, 820), succeeded=False) == Cost(0, 80, Basis.OBSERVED)


def test_receipt_of_a_failure_without_figures() -> None:
    """A failed task whose submission took nothing yet stays charged: no balance was seen after its end."""
    reservation = sent(Before(0, 900), after=Figures(0, 900))
    state = AccountState(prices={KIND: 70})
    assert receipt(state, reservation, Figures(), succeeded=False) == Cost(0, 70, Basis.ESTIMATED)


def test_receipt_above_the_highest_price() -> None:
    """A drop that no task of this kind can cause is somebody else's spending: the operator's price is the guess."""
    state, policy = AccountState(), AccountPolicy(max_price={KIND: 300})
    cost = receipt(state, sent(Before(0, 900)), Figures(0, 400), policy=policy)
    assert cost == Cost(0, 300, Basis.ESTIMATED)
    assert state.highest == {}


def test_when_the_upstream_charges() -> None:
    """A submit that leaves the balance as it was is charged later; a lone one that does not, at once."""
    state = AccountState()
    ledger_model.learn(state, sent(Before(0, 1_200), alone=False), Figures(0, 1_200))
    assert state.charged_late is True
    ledger_model.learn(state, sent(Before(0, 1_200), alone=False), Figures(0, 1_100))
    assert state.charged_late is True
    ledger_model.learn(state, sent(Before(0, 1_200), use=False), Figures(0, 1_100))
    assert state.charged_late is False


@pytest.mark.parametrize(("use", "after"), [(True, Figures(3, 1_100)), (False, Figures(2, 1_200))])
def test_drop_that_is_not_its_own(use: bool, after: Figures) -> None:
    """A submit that was to take the one tells nothing of when it is charged where the other dropped."""
    state = AccountState()
    ledger_model.learn(state, sent(Before(3, 1_200), use=use), after)
    assert state.charged_late is None


def test_answer_from_before_a_reopening() -> None:
    """What was sent before an operator had the account tried again is missing in the figures that are known since."""
    state, reservation = AccountState(uncharged=1, reopened=NOW + 1, charged_late=False), sent(owes=True)
    ledger_model.learn(state, reservation, Figures(3, 0))
    assert state.missing == 1
    ledger_model.conclude(state, reservation, Figures(3, 0), NOW, NOW + 5)
    assert (state.missing, state.astray_until) == (1, NOW + 5)


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
        ledger_model.expect(state, policy, KIND, 1)
    for drop in drops:
        ledger_model.explain(state, *drop)
    assert (state.unexplained_count, state.unexplained_money) == unexplained


@pytest.mark.parametrize(("caught_up", "unexplained"), [(NOW + 5, 0), (0, 1)])
def test_late_refusal(caught_up: int, unexplained: int) -> None:
    """A late refusal takes off what is expected only if the figures had not shown by then that nothing was taken."""
    state, late = AccountState(uncharged=1, astray=1, caught_up=caught_up), sent(owes=True, settled=NOW)
    ledger_model.expect(state, POLICY, KIND, 1)
    ledger_model.spare(state, POLICY, late, lacked=ledger_model.found(state, late))
    ledger_model.explain(state, 1, 0)
    assert state.unexplained_count == unexplained


def test_no_price_is_known() -> None:
    """Without a highest price any drop of the money may be the gateway's own."""
    state = AccountState()
    ledger_model.expect(state, POLICY, KIND, 1)
    ledger_model.explain(state, 0, 5_000)
    assert state.unexplained_money == 0
