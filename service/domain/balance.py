"""What is known of an upstream account, and what follows from it.

The upstream tells its figures only in passing, late and out of order. The scripts in `service/storage/lua`
carry these rules out on Redis; the functions here are their specification, and the model they are held
against. All times are milliseconds of the ledger's clock, money is in fen. Functions change the state they
are given and say what they decided.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct, field

from service.domain.task import Basis, Cost, Kind
from service.domain.tenancy import AccountPolicy, Purse

PROBE_INTERVAL = 60_000
"""An exhausted account is looked at once in this many milliseconds."""
ONE_AT_A_TIME = 2_000
"""When a `count_only` tenant waits for the balance to become known, it is told to come back after this."""


class Status(StrEnum):
    """Whether an account may be used."""

    OPEN = "open"
    EXHAUSTED = "exhausted"
    INVALID = "invalid"


class Source(StrEnum):
    """The call whose answer told a figure."""

    SUBMIT = "submit"
    CHECK = "check"


class Figure(Struct):
    """An observed figure: when its request was sent, when its answer was received, and which call it was."""

    value: int
    sent: int
    received: int
    source: Source


class Price(Struct):
    """What a task of some kind last cost: uses, and money in fen."""

    count: int
    money: int


class AccountState(Struct):
    """The ledger's knowledge of one account.

    `open` counts submissions that were reserved and have not ended, `sending` those not yet settled. `seq` numbers the
    reservations, so that a receipt can tell whether anything else happened on the account in the meantime. `closed` is
    when the request was sent whose refusal closed the account, `reopened` when an operator had it looked at again: what
    was sent before says nothing any more. `charged_late` says that a submit was seen to leave the balance as it was, so
    that accepted tasks are not in the figures before they end.
    """

    status: Status = Status.OPEN
    probe_at: int = 0
    closed: int = 0
    reopened: int = 0
    charged_late: bool = False
    count: Figure | None = None
    money: Figure | None = None
    open: int = 0
    sending: int = 0
    seq: int = 0
    unknown: int = 0
    prices: dict[Kind, Price] = field(default_factory=dict)
    highest: dict[Kind, int] = field(default_factory=dict)


class Figures(Struct, frozen=True):
    """What one answer told of the balance; a missing or mistyped figure is None. Money is in fen."""

    count: int | None = None
    money: int | None = None


class Standing(StrEnum):
    """Whether an account can take a submission now."""

    PAYS = "pays"
    PROBE = "probe"
    EXHAUSTED = "exhausted"
    INVALID = "invalid"


class Before(Struct):
    """The figures known when a submission was reserved."""

    count: int
    money: int


def standing(state: AccountState, policy: AccountPolicy, purse: Purse, kind: Kind, now: int) -> tuple[Standing, int]:
    """Whether the account can take one more submission, and when to look again if it can't."""
    if state.status is Status.INVALID:
        return Standing.INVALID, 0
    if state.status is Status.EXHAUSTED:
        if _may_probe(state, policy, purse) and now >= state.probe_at:
            return Standing.PROBE, now
        return Standing.EXHAUSTED, max(state.probe_at, now + ONE_AT_A_TIME)
    if purse is Purse.COUNT_ONLY:
        known = state.count
        pays = state.open == 0 if known is None else known.value - state.open > policy.floor_count
    else:
        pays = _can_pay(state, policy, kind, state.open if state.charged_late else state.sending)
    return (Standing.PAYS, now) if pays else (Standing.EXHAUSTED, now + ONE_AT_A_TIME)


def hold(state: AccountState, policy: AccountPolicy, kind: Kind) -> int | None:
    """The money one more submission may take, in fen; None where no price is known at all."""
    if state.count is not None and state.count.value > state.open:
        return 0
    return policy.max_price.get(kind, state.highest.get(kind))


def observe(
    state: AccountState, policy: AccountPolicy, figures: Figures, source: Source, sent: int, received: int
) -> None:
    """Take in what an answer told. A rise reopens an exhausted account, reaching the floors closes it."""
    if sent < state.reopened:
        return
    rose_count, state.count = _observed(state.count, figures.count, source, sent, received)
    rose_money, state.money = _observed(state.money, figures.money, source, sent, received)
    if state.status is Status.EXHAUSTED and (rose_count or rose_money):
        state.status = Status.OPEN
    if state.status is Status.OPEN and not _can_pay(state, policy, None, 0):
        state.status, state.probe_at = Status.EXHAUSTED, received + PROBE_INTERVAL


def refuse(state: AccountState, status: Status, sent: int, received: int) -> None:
    """The upstream said that the account can't pay, or that it does not know it.

    An answer whose request was sent before the known figures were asked for is too old to close anything.
    """
    newest = max((figure.sent for figure in (state.count, state.money) if figure), default=0)
    if sent >= max(newest, state.reopened):
        state.status, state.probe_at, state.closed = status, received + PROBE_INTERVAL, sent


def accept(state: AccountState, sent: int) -> None:
    """The upstream took a submission: the account is known and could pay, unless a later one was refused."""
    if sent > state.closed:
        state.status = Status.OPEN


def learn(state: AccountState, before: Before | None, after: Figures, *, alone: bool) -> None:
    """See from a submit that had the account to itself whether it is charged at once or at the task's end."""
    if alone and before and after.count is not None and after.money is not None:
        if (before.count, before.money) == (after.count, after.money):
            state.charged_late = True
        elif _is_price(before.count - after.count, before.money - after.money):
            state.charged_late = False


def receipt(
    state: AccountState,
    policy: AccountPolicy,
    kind: Kind,
    before: Before | None,
    after: Figures,
    *,
    alone: bool,
    succeeded: bool,
) -> Cost:
    """What an ended task cost, remembering the price if it was observed.

    `before` is the balance known when it was reserved, `after` the newest figures told about it. They are a
    receipt only if nothing else of the account was open in between (`alone`), and if the drop is one that a task
    can cause, not above what the operator calls the highest price. Where prepaid uses are left, a task took one of
    them, since they are spent before money; else the last price of its kind is taken, or the operator's highest.
    """
    if alone and before and after.count is not None and after.money is not None:
        count, money = before.count - after.count, before.money - after.money
        if _is_price(count, money) and money <= policy.max_price.get(kind, money):
            if count or money:
                state.prices[kind] = Price(count, money)
                state.highest[kind] = max(state.highest.get(kind, 0), money)
            if count or money or not succeeded:
                return Cost(count, money, Basis.OBSERVED)
    if after.count:
        return Cost(1, 0, Basis.ESTIMATED)
    if kind in state.prices:
        return Cost(state.prices[kind].count, state.prices[kind].money, Basis.ESTIMATED)
    if after.count == 0 and kind in policy.max_price:
        return Cost(0, policy.max_price[kind], Basis.ESTIMATED)
    return Cost(0, 0, Basis.UNKNOWN)


def _observed(
    known: Figure | None, value: int | None, source: Source, sent: int, received: int
) -> tuple[bool, Figure | None]:
    """Whether a figure rose, and what is known of it after an observation."""
    if value is None:
        return False, known
    if known is None or sent > known.received:
        return known is not None and value > known.value, Figure(value, sent, received, source)
    if value < known.value:
        return False, Figure(value, max(sent, known.sent), max(received, known.received), source)
    return False, known


def _is_price(count: int, money: int) -> bool:
    """Whether a drop of the balance is one that a single task can cause: one use, or money, or nothing."""
    return (count, money) == (1, 0) or (count == 0 and money >= 0)


def _can_pay(state: AccountState, policy: AccountPolicy, kind: Kind | None, submissions: int) -> bool:
    """Whether the known figures, less submissions that are not in them yet, stay above the floors.

    Uses are spent before money, so that money is of no help while uses are left that shall stay.
    """
    if state.count is None:
        return True
    left = state.count.value - submissions
    if left > 0:
        return left > policy.floor_count
    if state.money is None:
        return True
    price = state.highest.get(kind, 0) if kind else 0
    return state.money.value + left * price > policy.floor_money


def _may_probe(state: AccountState, policy: AccountPolicy, purse: Purse) -> bool:
    """Whether an ordinary submission may test an exhausted account.

    Not where only the count may be spent, and not where the probe would eat into a floor that the figures still show.
    """
    if purse is Purse.COUNT_ONLY:
        return False
    below_floor = [
        figure.value > 0 and floor > 0
        for figure, floor in ((state.count, policy.floor_count), (state.money, policy.floor_money))
        if figure
    ]
    return not any(below_floor)
