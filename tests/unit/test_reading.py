"""What is concluded from figures that overlap, and from those that are close to a floor."""

from __future__ import annotations

from typing import Any

import pytest

from service.domain import availability
from service.domain.availability import MOST_IN_VAIN, ONE_AT_A_TIME, PROBE_INTERVAL, Standing
from service.domain.ledger import AccountState, Figure, Figures, Newest, Source, Status
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, Purse
from tests.model import ledger_model

POLICY = AccountPolicy()
PRICED = AccountPolicy(floor_money=200, max_price={Kind.UPSCALE: 300, Kind.SEAMLESS: 100})
NEWEST = Newest("r1", sent=5, count=0, money=0)


def known(count: int, money: int, **fields: Any) -> AccountState:
    """An account of which these figures are known."""
    figures = [Figure(each, 10, 20, Source.CHECK) for each in (count, money)]
    return AccountState(count=figures[0], money=figures[1], **fields)


def pays(state: AccountState, policy: AccountPolicy, kind: Kind) -> bool:
    return availability.standing(state, policy, Purse.COUNT_THEN_MONEY, kind, 100)[0] is Standing.PAYS


@pytest.mark.parametrize(("rose", "unexplained"), [(20, 0), (14, 300)])
def test_answer_from_before_a_rise(rose: int, unexplained: int) -> None:
    """A lower figure that may be from before the known one rose is believed, and nobody suspected of the drop."""
    state = known(0, 900, rose=rose)
    ledger_model.observe(state, POLICY, Figures(0, 600), Source.SUBMIT, sent=15, received=30)
    assert state.money == Figure(600, 15, 30, Source.SUBMIT)
    assert state.unexplained_money == unexplained


def test_rise_between_two_answers() -> None:
    """Of two answers that overlap, the first from behind a top-up and the second from before it, none is suspicious."""
    state = known(0, 600)
    ledger_model.observe(state, POLICY, Figures(0, 900), Source.SUBMIT, sent=31, received=40)
    ledger_model.observe(state, POLICY, Figures(0, 600), Source.SUBMIT, sent=30, received=50)
    assert state.unexplained_money == 0
    ledger_model.observe(state, POLICY, Figures(0, 500), Source.SUBMIT, sent=60, received=70)
    assert state.unexplained_money == 100


def test_no_overtaking() -> None:
    """Nobody goes on to money while one that must not take any is on its way to the last use."""
    assert pays(known(1, 900, uncharged=1), POLICY, Kind.UPSCALE)
    assert not pays(known(1, 900, uncharged=1, thrifty=1), POLICY, Kind.UPSCALE)


@pytest.mark.parametrize(("money", "kind", "enough"), [(500, Kind.UPSCALE, True), (499, Kind.UPSCALE, False)])
def test_floor_of_money(money: int, kind: Kind, *, enough: bool) -> None:
    """A task that would bring the money below its floor is not sent."""
    assert pays(known(0, money), PRICED, kind) is enough


def test_dearer_one_under_way() -> None:
    """Beside one that is under way either may be the dearest: neither is to bring the money below its floor."""
    assert pays(known(0, 700), PRICED, Kind.SEAMLESS)
    assert not pays(known(0, 700, uncharged=1), PRICED, Kind.SEAMLESS)
    assert pays(known(0, 800, uncharged=1), PRICED, Kind.SEAMLESS)


def test_uses_that_shall_stay() -> None:
    """Those who would pay with money wait as long as uses that shall stay are left to be taken."""
    policy = AccountPolicy(floor_count=2)
    assert pays(known(0, 900, uncharged=1), policy, Kind.UPSCALE)
    assert not pays(known(1, 900, uncharged=1), policy, Kind.UPSCALE)


def test_when_to_look() -> None:
    """Who is refused although nothing runs is told when the next look is; if something runs, to come back soon."""
    state = known(0, 400, looks=True, looked=90)
    state.newest = NEWEST
    assert ledger_model.look_due(state, PRICED, 90 + PROBE_INTERVAL, count_only=False)
    answer = availability.standing(state, PRICED, Purse.COUNT_THEN_MONEY, Kind.UPSCALE, 100)
    assert answer == (Standing.EXHAUSTED, 90 + PROBE_INTERVAL)
    state.open = state.uncharged = 1
    assert not ledger_model.look_due(state, PRICED, 90 + PROBE_INTERVAL, count_only=False)
    answer = availability.standing(state, PRICED, Purse.COUNT_THEN_MONEY, Kind.UPSCALE, 100)
    assert answer == (Standing.EXHAUSTED, 100 + ONE_AT_A_TIME)


def test_looks_in_vain() -> None:
    """Submissions probe again after so many looks that told nothing, until one tells or a task has ended."""
    state = AccountState(status=Status.EXHAUSTED, looks=True, newest=NEWEST)
    for _ in range(MOST_IN_VAIN):
        assert availability.standing(state, POLICY, Purse.COUNT_THEN_MONEY, Kind.UPSCALE, 100)[0] is Standing.EXHAUSTED
        ledger_model.begin_look(state, 0)
    assert availability.standing(state, POLICY, Purse.COUNT_THEN_MONEY, Kind.UPSCALE, 100)[0] is Standing.PROBE
    ledger_model.looked(state, POLICY, "r1", Figures(0, 0), sent=50, received=60)
    assert availability.standing(state, POLICY, Purse.COUNT_THEN_MONEY, Kind.UPSCALE, 100)[0] is Standing.EXHAUSTED
