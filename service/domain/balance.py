"""What follows from what is known of an upstream account.

The upstream tells its figures only in passing, late and out of order. The scripts in `service/storage/lua`
carry these rules out on Redis; the functions here are their specification, and the model they are held
against. All times are milliseconds of the ledger's clock, money is in fen. Functions change the state they
are given and say what they decided.
"""

from __future__ import annotations

from enum import StrEnum

from service.domain import charges
from service.domain.account import (
    AccountState,
    Figure,
    Figures,
    Newest,
    Source,
    Status,
)
from service.domain.task import Kind
from service.domain.tenancy import AccountPolicy, Purse

PROBE_INTERVAL = 60_000
"""An exhausted account is looked at once in this many milliseconds."""
MOST_IN_VAIN = 5
"""After so many looks that told nothing, ordinary submissions test an exhausted account again."""
ONE_AT_A_TIME = 2_000
"""When a `count_only` tenant waits for the balance to become known, it is told to come back after this."""


class Standing(StrEnum):
    """Whether an account can take a submission now."""

    PAYS = "pays"
    PROBE = "probe"
    EXHAUSTED = "exhausted"
    INVALID = "invalid"


def standing(state: AccountState, policy: AccountPolicy, purse: Purse, kind: Kind, now: int) -> tuple[Standing, int]:
    """Whether the account can take one more submission, and when to look again if it can't."""
    if state.status is Status.INVALID:
        return Standing.INVALID, 0
    exhausted = state.status is Status.EXHAUSTED
    if not exhausted and _pays(state, policy, purse, kind):
        return Standing.PAYS, now
    waits = exhausted or _is_stuck(state)
    if waits and _may_probe(state, policy, purse) and now >= state.probe_at:
        return Standing.PROBE, now
    at = now + ONE_AT_A_TIME
    if _can_look(state) and (exhausted or state.open == 0):
        at = max(state.looked + PROBE_INTERVAL, at)
    elif waits:
        at = max(state.probe_at, at)
    return Standing.EXHAUSTED, at


def hold(state: AccountState, policy: AccountPolicy, kind: Kind) -> int | None:
    """The money one more submission may take, in fen; None where no price is known at all."""
    if state.count is not None and state.count.value > max(state.open, state.missing):
        return 0
    return policy.max_price.get(kind, state.highest.get(kind))


def observe(
    state: AccountState,
    policy: AccountPolicy,
    figures: Figures,
    source: Source,
    sent: int,
    received: int,
    kind: Kind | None = None,
) -> None:
    """Take in what the answer to a submission of `kind`, or to a check, told.

    A rise reopens an exhausted account, reaching the floors closes it. A drop that the gateway's own submissions can't
    explain is somebody else's, but for one to what may have been the figures before they last rose. What became of a
    submission in doubt may show.
    """
    if sent < state.reopened:
        return
    charges.resolve(state, figures, source, sent, kind)
    begins = state.count is None or state.money is None
    count, state.count = _observed(state.count, figures.count, source, sent, received)
    money, state.money = _observed(state.money, figures.money, source, sent, received)
    if sent > state.rose:
        charges.explain(state, max(-count, 0), max(-money, 0))
    charges.catch_up(state, figures, sent, received)
    rises = count > 0 or money > 0
    if begins or rises:
        state.rose = received
    if state.status is Status.EXHAUSTED and rises:
        state.status = Status.OPEN
    if state.status is Status.OPEN and not _can_pay(state, policy, None, 0):
        _close(state, Status.EXHAUSTED, received)


def refuse(state: AccountState, status: Status, sent: int, received: int) -> None:
    """The upstream said that the account can't pay, or that it does not know it.

    An answer whose request was sent before the known figures were asked for is too old to close anything.
    """
    newest = max((figure.sent for figure in (state.count, state.money) if figure), default=0)
    if sent >= max(newest, state.reopened):
        _close(state, status, received)
        state.closed = sent


def accept(state: AccountState, sent: int) -> None:
    """The upstream took a submission: the account is known and could pay, unless a later one was refused."""
    if sent > state.closed:
        state.status = Status.OPEN


def look_due(state: AccountState, policy: AccountPolicy, now: int, *, count_only: bool) -> bool:
    """Whether the newest finished task is to be checked again, which tells the balance without spending any.

    That is so for an account that is exhausted, or too close to its floor for some task, for one whose figures may lack
    submissions that have ended, and where a tenant that may spend nothing but uses (`count_only`) waits for some: once
    per interval.
    """
    if state.newest is None or state.status is Status.INVALID or now < state.looked + PROBE_INTERVAL:
        return False
    if state.status is Status.EXHAUSTED or (state.looks and _is_stuck(state)):
        return True
    if count_only and state.count is not None and state.count.value - state.missing <= policy.floor_count:
        return True
    return policy.floor_money > 0 and state.open == 0 and not _can_pay(state, policy, _dearest(state, policy), 0)


def begin_look(state: AccountState, now: int) -> None:
    """An account is being looked at, which may tell nothing."""
    state.looked = now
    state.in_vain += 1


def looked(
    state: AccountState,
    policy: AccountPolicy,
    reservation: str,
    figures: Figures,
    sent: int,
    received: int,
) -> None:
    """Take in what a second check of a finished task told.

    Figures that differ from those of its first check are today's: from then on all such figures are believed. One that
    tells none is not asked again.
    """
    newest = state.newest
    if newest is None or newest.reservation != reservation:
        return
    state.in_vain = 0
    if figures.count is None or figures.money is None:
        state.newest = None
        return
    if (figures.count, figures.money) != (newest.count, newest.money):
        state.looks = True
    if state.looks:
        state.newest = Newest(reservation, max(sent, newest.sent), figures.count, figures.money)
        observe(state, policy, figures, Source.CHECK, sent, received)


def finished(state: AccountState, reservation: str, figures: Figures, sent: int) -> None:
    """A task has ended: if it told figures and none was checked later, it is the one to check again."""
    if figures.count is None or figures.money is None or (state.newest and sent < state.newest.sent):
        return
    state.newest, state.in_vain = Newest(reservation, sent, figures.count, figures.money), 0


def _observed(
    known: Figure | None, value: int | None, source: Source, sent: int, received: int
) -> tuple[int, Figure | None]:
    """By how much a figure rose (or dropped, below zero), and what is known of it after an observation."""
    if value is None:
        return 0, known
    if known is None or sent > known.received:
        return (value - known.value if known else 0), Figure(value, sent, received, source)
    if value < known.value:
        latest = max(received, known.received)
        return value - known.value, Figure(value, max(sent, known.sent), latest, source)
    return 0, known


def _close(state: AccountState, status: Status, received: int) -> None:
    state.status, state.probe_at, state.looked = status, received + PROBE_INTERVAL, received


def _can_look(state: AccountState) -> bool:
    """Whether the balance can be read without spending any."""
    return state.looks and state.newest is not None and state.in_vain < MOST_IN_VAIN


def _pays(state: AccountState, policy: AccountPolicy, purse: Purse, kind: Kind) -> bool:
    """Whether an open account can pay for one more submission out of this purse."""
    if purse is not Purse.COUNT_ONLY:
        return _can_pay(state, policy, _price(state, policy, kind), state.missing)
    if state.count is None:
        return state.open == 0
    return state.count.value - max(state.open, state.missing) > policy.floor_count


def _can_pay(state: AccountState, policy: AccountPolicy, price: int | None, submissions: int) -> bool:
    """Whether the known figures, less submissions that are not in them yet, stay above the floors.

    One more at this price (0 if nobody knows it; None to ask about no other) is not to take them below either: of those
    that are under way any may be overtaken by a cheaper one. Uses are spent before money, so that money is of no help
    while uses are left that shall stay, or that one which must not take money is on its way to.
    """
    if state.count is None:
        return True
    left = state.count.value - submissions
    if left > 0 or (state.count.value > 0 and policy.floor_count > 0):
        return left > policy.floor_count
    if price is not None and state.thrifty:
        return False
    if state.money is None:
        return True
    price = price or 0
    each = _dearest(state, policy) if submissions else price
    if policy.floor_money and state.money.value + (left - 1) * each < policy.floor_money:
        return False
    return state.money.value + left * price > policy.floor_money


def _price(state: AccountState, policy: AccountPolicy, kind: Kind) -> int:
    """What a task of a kind takes at the most, in fen; 0 where nobody knows."""
    return policy.max_price.get(kind, state.highest.get(kind, 0))


def _dearest(state: AccountState, policy: AccountPolicy) -> int:
    """What a task of any kind takes at the most, in fen."""
    return max((*policy.max_price.values(), *state.highest.values()), default=0)


def _is_stuck(state: AccountState) -> bool:
    """Whether the figures may lack submissions that have ended, so that none of these will tell any more."""
    return state.open == 0 and state.astray > 0


def _may_probe(state: AccountState, policy: AccountPolicy, purse: Purse) -> bool:
    """Whether an ordinary submission may test an exhausted account.

    Not where only the count may be spent, not where the balance can be read for nothing, and not where the probe would
    eat into a floor that the figures still show.
    """
    if purse is Purse.COUNT_ONLY or _can_look(state):
        return False
    below_floor = [
        figure.value > 0 and floor > 0
        for figure, floor in ((state.count, policy.floor_count), (state.money, policy.floor_money))
        if figure
    ]
    return not any(below_floor)
