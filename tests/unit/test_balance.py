"""What is concluded from the figures that an upstream account tells."""

from __future__ import annotations

import pytest

from service.domain import availability
from service.domain.availability import PROBE_INTERVAL, Standing
from service.domain.ledger import AccountState, Figure, Figures, Source, Status
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, Purse
from tests.model import ledger_model

POLICY = AccountPolicy()
MONEY = Purse.COUNT_THEN_MONEY


def known(count: int | None = None, money: int | None = None, sent: int = 10, received: int = 20) -> AccountState:
    """An account of which these figures are known."""
    return AccountState(
        count=None if count is None else Figure(count, sent, received, Source.CHECK),
        money=None if money is None else Figure(money, sent, received, Source.CHECK),
    )


def standing(state: AccountState, *, purse: Purse = MONEY, policy: AccountPolicy = POLICY, now: int = 100) -> Standing:
    return availability.standing(state, policy, purse, Kind.UPSCALE, now)[0]


def test_later_observation_replaces() -> None:
    """A figure that was asked for after the known one was received replaces it, up or down."""
    state = known(count=5, money=100)
    ledger_model.observe(state, POLICY, Figures(7, 50), Source.CHECK, sent=21, received=30)
    assert (state.count, state.money) == (Figure(7, 21, 30, Source.CHECK), Figure(50, 21, 30, Source.CHECK))


def test_overlapping_observation_only_lowers() -> None:
    """A figure whose request overlapped the known one's is believed only if it is lower."""
    state = known(count=5, money=100)
    ledger_model.observe(state, POLICY, Figures(7, 50), Source.CHECK, sent=15, received=30)
    assert state.count == Figure(5, 10, 20, Source.CHECK)
    assert state.money == Figure(50, 15, 30, Source.CHECK)


def test_missing_figure_is_no_observation() -> None:
    """What an answer does not tell stays what it was."""
    state = known(count=5)
    ledger_model.observe(state, POLICY, Figures(), Source.CHECK, sent=30, received=40)
    assert (state.count, state.money) == (Figure(5, 10, 20, Source.CHECK), None)


def test_floors_close() -> None:
    """An account whose figures reach its floors is exhausted until it is looked at again."""
    state = known()
    ledger_model.observe(
        state, AccountPolicy(floor_count=2, floor_money=100), Figures(2, 100), Source.CHECK, sent=30, received=40
    )
    assert (state.status, state.probe_at) == (Status.EXHAUSTED, 40 + PROBE_INTERVAL)


def test_rise_reopens() -> None:
    """A top-up that is seen reopens an exhausted account, and an unchanged figure does not."""
    state = known(count=0, money=0)
    state.status = Status.EXHAUSTED
    ledger_model.observe(state, POLICY, Figures(0, 0), Source.CHECK, sent=30, received=40)
    assert state.status is Status.EXHAUSTED
    ledger_model.observe(state, POLICY, Figures(0, 500), Source.CHECK, sent=50, received=60)
    assert standing(state) is Standing.PAYS


def test_old_refusal_closes_nothing() -> None:
    """A refusal that was asked for before the known figures were is too old to close the account."""
    state = known(count=5, sent=10)
    ledger_model.refuse(state, Status.EXHAUSTED, sent=9, received=30)
    assert standing(state) is Standing.PAYS
    ledger_model.refuse(state, Status.EXHAUSTED, sent=10, received=30)
    assert state.status is Status.EXHAUSTED


def test_old_acceptance_opens_nothing() -> None:
    """An acceptance of what was sent before the refusal was does not reopen the account, a later one does."""
    state = known()
    ledger_model.refuse(state, Status.INVALID, sent=50, received=60)
    ledger_model.accept(state, sent=50)
    assert standing(state) is Standing.INVALID
    ledger_model.accept(state, sent=51)
    assert state.status is Status.OPEN


def test_probes() -> None:
    """An exhausted account takes one probe per interval, and none from a tenant that may not spend money."""
    state = known(count=0, money=0)
    ledger_model.refuse(state, Status.EXHAUSTED, sent=50, received=60)
    assert standing(state, now=60) is Standing.EXHAUSTED
    assert standing(state, now=60 + PROBE_INTERVAL) is Standing.PROBE
    assert standing(state, now=60 + PROBE_INTERVAL, purse=Purse.COUNT_ONLY) is Standing.EXHAUSTED


def test_no_probe_below_a_floor() -> None:
    """A probe never eats into what shall stay in the account."""
    state = known(count=0, money=300)
    policy = AccountPolicy(floor_money=300)
    ledger_model.refuse(state, Status.EXHAUSTED, sent=50, received=60)
    assert standing(state, policy=policy, now=60 + PROBE_INTERVAL) is Standing.EXHAUSTED


def test_count_only() -> None:
    """A tenant that may spend no money needs a use for each open submission, and with an unknown count goes alone."""
    assert standing(known(count=1), purse=Purse.COUNT_ONLY) is Standing.PAYS
    one_open = known(count=1)
    one_open.open = 1
    assert standing(one_open, purse=Purse.COUNT_ONLY) is Standing.EXHAUSTED
    assert standing(AccountState(), purse=Purse.COUNT_ONLY) is Standing.PAYS
    assert standing(AccountState(open=1), purse=Purse.COUNT_ONLY) is Standing.EXHAUSTED


def test_submissions_on_their_way_count() -> None:
    """What is being sent counts against the known figures: uses first, then money at the highest price seen."""
    state = known(count=1, money=500)
    state.highest[Kind.UPSCALE] = 300
    state.uncharged = 2
    assert standing(state) is Standing.PAYS
    state.uncharged = 3
    assert standing(state) is Standing.EXHAUSTED


def test_unknown_balance_is_the_upstream_s_to_decide() -> None:
    """With a figure missing a submission is let through."""
    assert standing(AccountState()) is Standing.PAYS
    assert standing(known(count=0)) is Standing.PAYS


@pytest.mark.parametrize(
    ("count", "is_open", "max_price", "highest", "held"),
    [
        (3, 2, {}, {}, 0),
        (3, 3, {Kind.UPSCALE: 250}, {Kind.UPSCALE: 100}, 250),
        (None, 0, {}, {Kind.UPSCALE: 100}, 100),
        (0, 0, {}, {}, None),
    ],
)
def test_what_is_held(
    count: int | None, is_open: int, max_price: dict[Kind, int], highest: dict[Kind, int], held: int | None
) -> None:
    """Nothing is held while uses are left; else the operator's price, the highest seen, or all there is."""
    state = known(count=count)
    state.open, state.highest = is_open, highest
    assert ledger_model.hold(state, AccountPolicy(max_price=max_price), Kind.UPSCALE) == held


def test_count_floor_is_kept_from_money_too() -> None:
    """While uses are left that shall stay, money is of no help: the upstream would spend the uses."""
    policy = AccountPolicy(floor_count=5)
    assert standing(known(count=6, money=10_000), policy=policy) is Standing.PAYS
    assert standing(known(count=4, money=10_000), policy=policy) is Standing.EXHAUSTED
    assert standing(known(count=0, money=10_000), policy=policy) is Standing.PAYS


def test_what_was_sent_before_a_reopening_is_void() -> None:
    """A refusal or a figure that was asked for before an operator had the account looked at again says nothing."""
    state = AccountState(reopened=100)
    ledger_model.refuse(state, Status.INVALID, sent=99, received=150)
    ledger_model.observe(state, POLICY, Figures(0, 0), Source.SUBMIT, sent=99, received=150)
    assert (state.status, state.count, state.money) == (Status.OPEN, None, None)
    ledger_model.refuse(state, Status.INVALID, sent=100, received=150)
    assert standing(state) is Standing.INVALID
