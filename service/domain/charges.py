"""What an account was charged for, as far as its balance tells.

A drop is a receipt if it can only be that of one task; it may settle what became of a submission of unknown outcome;
and what the gateway's own submissions can't explain, somebody else has taken. Times are milliseconds of the ledger's
clock, money is in fen. Functions change the state they are given and say what they decided.
"""

from __future__ import annotations

from service.domain.account import AccountState, Before, Doubt, Figures, Owing, Price, Source, Suggestion
from service.domain.task import Basis, Cost, Kind
from service.domain.tenancy import AccountPolicy

UNKNOWN_SETTLES = 3_600_000
"""For so long after its outcome became unknown a submission may yet be charged."""


def owe(state: AccountState, policy: AccountPolicy, kind: Kind, sign: int) -> None:
    """Count a submission among those that may yet be charged, or (with a sign of -1) no longer."""
    price = policy.max_price.get(kind)
    owing = state.owing
    owing.tasks = max(owing.tasks + sign, 0)
    if price is None:
        owing.unpriced = max(owing.unpriced + sign, 0)
    else:
        owing.money = max(owing.money + sign * price, 0)


def explain(state: AccountState, count: int, money: int) -> None:
    """Set a drop against what the gateway's own submissions may have taken; what is left was taken by somebody else."""
    owing = state.owing
    state.unexplained_count += max(count - owing.tasks, 0)
    if not owing.unpriced:
        state.unexplained_money += max(money - owing.money, 0)
    owing.tasks = max(owing.tasks - count, 0)
    owing.money = max(owing.money - money, 0)
    if owing.tasks == 0:
        state.owing = Owing()


def quieten(state: AccountState, figures: Figures, now: int, *, alone: bool) -> None:
    """See at the end of a task whether any submission may yet be charged.

    None can once all have ended and each has told figures: the last of them to end told of all. A task that fails tells
    none, and leaves it open until one that had the account to itself has told (`alone`). So do for a while submissions
    of unknown outcome: they may be under way.
    """
    if figures.count is None or figures.money is None:
        state.blind = state.blind or state.owing.tasks > 0
    elif state.open == 0 and (alone or not state.blind) and now - state.unknown_at >= UNKNOWN_SETTLES:
        state.owing, state.blind = Owing(), False


def wonder(state: AccountState, reservation: str, seq: int, before: Before | None, now: int, *, alone: bool) -> None:
    """A submission became unknown: if it had the account to itself, the next figures may tell what became of it."""
    state.unknown_at = now
    if alone and before:
        state.doubt = Doubt(reservation, seq, now, before.count, before.money)


def resolve(state: AccountState, figures: Figures, source: Source, sent: int, kind: Kind | None) -> None:
    """See from the first figures after a submission in doubt whether it was charged.

    Nothing else may have happened since, but for the one submission (of `kind`) whose answer this is.
    """
    doubt = state.doubt
    if doubt is None or doubt.suggests or figures.count is None or figures.money is None or sent < doubt.since:
        return
    count, money, others = doubt.count - figures.count, doubt.money - figures.money, state.seq - doubt.seq
    own: Price | None = Price(0, 0)
    if others == 1 and source is Source.SUBMIT and not state.charged_late:
        own = Price(1, 0) if count > 0 or kind is None else state.prices.get(kind)
    elif others > 1 or (others == 1 and source is Source.CHECK):
        own = None
    if own is None or not _is_price(count - own.count, money - own.money):
        state.doubt = None
    elif (count, money) != (own.count, own.money):
        doubt.suggests = Suggestion.CHARGED
    elif state.charged_late is False:
        doubt.suggests = Suggestion.NOT_CHARGED
    elif others:
        state.doubt = None


def learn(
    state: AccountState,
    policy: AccountPolicy,
    kind: Kind,
    before: Before | None,
    after: Figures,
    now: int,
    *,
    alone: bool,
) -> None:
    """See from the answer to a submission that had the account to itself what it was charged for, once it is observed.

    If it was charged at once so are others, else at the task's end. What ended before it was sent is in the figures.
    """
    if not alone or after.count is None or after.money is None:
        return
    count, money = (before.count - after.count, before.money - after.money) if before else (0, 0)
    charged = (count, money) != (0, 0)
    if before and _is_price(count, money):
        state.charged_late = not charged
    if now - state.unknown_at >= UNKNOWN_SETTLES:
        state.owing, state.blind = Owing(), False
        if not charged:
            owe(state, policy, kind, 1)


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


def _is_price(count: int, money: int) -> bool:
    """Whether a drop of the balance is one that a single task can cause: one use, or money, or nothing."""
    return (count, money) == (1, 0) or (count == 0 and money >= 0)
