"""What an account was charged for, as far as its balance tells.

A drop is a receipt if it can only be that of one task; it may settle what became of a submission of unknown outcome;
and what the gateway's own submissions can't explain, somebody else has taken. Times are milliseconds of the ledger's
clock, money is in fen. Functions change the state they are given and say what they decided.
"""

from __future__ import annotations

from service.domain.account import AccountState, Doubt, Expected, Figures, Source, Suggestion
from service.domain.reservation import Reservation
from service.domain.task import Basis, Cost, Kind
from service.domain.tenancy import AccountPolicy

UNKNOWN_SETTLES = 600_000
"""For so long after its outcome became unknown a submission may yet be charged: ten minutes."""


def expect(state: AccountState, policy: AccountPolicy, kind: Kind, sign: int) -> None:
    """Count a submission among those that the balance may drop for, or (with a sign of -1) no longer."""
    price = policy.max_price.get(kind)
    expected = state.expected
    expected.tasks = max(expected.tasks + sign, 0)
    if price is None:
        expected.unpriced = max(expected.unpriced + sign, 0)
    else:
        expected.money = max(expected.money + sign * price, 0)


def explain(state: AccountState, count: int, money: int) -> None:
    """Set a drop against what the gateway's own submissions may have taken; what is left was taken by somebody else.

    Once each of them is seen to have taken a use, none has taken money.
    """
    expected = state.expected
    state.unexplained_count += max(count - expected.tasks, 0)
    expected.tasks = max(expected.tasks - count, 0)
    if expected.tasks == 0:
        state.unexplained_money += money + expected.taken
        state.expected = Expected()
        return
    own = money if expected.unpriced else min(money, expected.money)
    state.unexplained_money += money - own
    expected.money = max(expected.money - own, 0)
    expected.taken += own


def owe(state: AccountState, reservation: Reservation) -> None:
    """From now on the figures may lack this submission, which is under way."""
    state.uncharged += 1
    state.thrifty += reservation.thrifty
    reservation.owes = True


def paid(state: AccountState, reservation: Reservation) -> None:
    """The figures show what this submission, which was under way, took if it took anything."""
    if reservation.owes:
        state.uncharged -= 1
        reservation.owes = False
    _landed(state, reservation)
    _balance(state)


def spare(state: AccountState, policy: AccountPolicy, reservation: Reservation, *, lacked: bool) -> None:
    """This submission takes nothing; the figures might have `lacked` it until now, so that it was still expected to."""
    if lacked:
        expect(state, policy, reservation.kind, -1)
    paid(state, reservation)


def stray(state: AccountState, reservation: Reservation, until: int) -> None:
    """This submission is no longer under way, and may be missing in the figures until they are asked for at `until`."""
    if reservation.owes:
        state.uncharged -= 1
        state.astray += 1
        state.astray_until = max(state.astray_until, until)
    _landed(state, reservation)


def found(state: AccountState, reservation: Reservation) -> bool:
    """What became of a stray submission is known; whether the figures might have lacked it until now."""
    lacked = reservation.owes and reservation.settled > state.caught_up
    if lacked:
        state.astray -= 1
    reservation.owes = False
    _balance(state)
    return lacked


def catch_up(state: AccountState, figures: Figures, sent: int, received: int) -> None:
    """See whether figures that were asked for at `sent` show all the strays."""
    if state.astray and figures.count is not None and figures.money is not None and sent >= state.astray_until:
        state.astray, state.caught_up = 0, received
        _balance(state)


def _landed(state: AccountState, reservation: Reservation) -> None:
    state.thrifty -= reservation.thrifty
    reservation.thrifty = False


def _balance(state: AccountState) -> None:
    """Where the figures lack nothing, no drop is to be expected any more."""
    if state.missing == 0:
        state.expected = Expected()


def wonder(state: AccountState, name: str, reservation: Reservation, now: int) -> None:
    """A submission became unknown. If it had the account to itself, the next figures may tell what became of it."""
    stray(state, reservation, now + UNKNOWN_SETTLES)
    before = reservation.before
    if _by_itself(state, reservation) and reservation.clean and before:
        state.doubt = Doubt(name, reservation.seq, now, before.count, before.money)


def resolve(state: AccountState, figures: Figures, source: Source, sent: int, kind: Kind | None) -> None:
    """See from the first figures after a submission in doubt whether it was charged.

    Nothing else may have happened since, but for the one submission (of `kind`) whose answer this is.
    """
    doubt = state.doubt
    if doubt is None or doubt.suggests or figures.count is None or figures.money is None or sent <= doubt.since:
        return
    count, money, others = doubt.count - figures.count, doubt.money - figures.money, state.seq - doubt.seq
    own: tuple[int, int] | None = (0, 0)
    if others == 1 and source is Source.SUBMIT and not state.charged_late:
        price = state.prices.get(kind) if kind else None
        own = (1, 0) if count > 0 else None if price is None else (0, price)
    elif others > 1 or (others == 1 and source is Source.CHECK):
        own = None
    if own is None or not _is_price(count - own[0], money - own[1]):
        state.doubt = None
    elif (count, money) != own:
        doubt.suggests = Suggestion.CHARGED
    elif state.charged_late is False:
        doubt.suggests = Suggestion.NOT_CHARGED
    elif others:
        state.doubt = None


def tell(state: AccountState, policy: AccountPolicy, reservation: Reservation) -> None:
    """Write to the submission in doubt what was found out of it."""
    if state.doubt and state.doubt.suggests:
        reservation.suggests = state.doubt.suggests
        if reservation.suggests is Suggestion.NOT_CHARGED:
            expect(state, policy, reservation.kind, -1)
        found(state, reservation)
        state.doubt = None


def learn(state: AccountState, reservation: Reservation, after: Figures) -> None:
    """See from the answer to a submission when it is charged, once that answer is observed.

    If it took nothing it is at the task's end; if it had the account to itself and took something, at once.
    """
    if after.count is None or after.money is None or reservation.sent < state.reopened:
        return
    before = reservation.before
    if before:
        count, money = before.count - after.count, before.money - after.money
        if (count, money) == (0, 0):
            state.charged_late = True
        elif (
            _by_itself(state, reservation)
            and reservation.clean
            and _is_price(count, money)
            and count == reservation.use
        ):
            state.charged_late = False
    if state.charged_late is False:
        paid(state, reservation)


def conclude(state: AccountState, reservation: Reservation, figures: Figures, asked: int, now: int) -> None:
    """A task has ended: its figures, which are observed, show what it took. Without them it is astray."""
    if figures.count is None or figures.money is None or asked < state.reopened:
        stray(state, reservation, now)
    else:
        paid(state, reservation)


def receipt(
    state: AccountState, policy: AccountPolicy, reservation: Reservation, figures: Figures, *, succeeded: bool
) -> Cost:
    """What an ended task cost, remembering the price if it was observed; `figures` were told about its end.

    The drop is a receipt if nothing else of the account was open in between, if it is one that a task can cause, and
    not above what the operator calls the highest price. A task that failed tells no figures; what it took shows in
    those of its submission where tasks are charged at once, but is an estimate: it may have been given back since. Else
    it is taken to be a use, if it was to take one, or the last price of its kind, or the operator's highest.
    """
    kind, before, told = reservation.kind, reservation.before, figures
    observed_end = figures.count is not None and figures.money is not None
    if not observed_end and not state.charged_late and reservation.after:
        told = reservation.after
    by_itself = _by_itself(state, reservation) and reservation.clean
    if by_itself and before and told.count is not None and told.money is not None:
        count, money = before.count - told.count, before.money - told.money
        if _is_price(count, money) and money <= policy.max_price.get(kind, money):
            if money:
                state.prices[kind] = money
                state.highest[kind] = max(state.highest.get(kind, 0), money)
            if count or money or (observed_end and not succeeded):
                return Cost(count, money, Basis.OBSERVED if succeeded or observed_end else Basis.ESTIMATED)
    left = told.count if told.count is not None or state.count is None else state.count.value
    if reservation.use or (reservation.use is None and left):
        return Cost(1, 0, Basis.ESTIMATED)
    price = state.prices.get(kind, policy.max_price.get(kind) if left is not None else None)
    return Cost(0, 0, Basis.UNKNOWN) if price is None else Cost(0, price, Basis.ESTIMATED)


def _by_itself(state: AccountState, reservation: Reservation) -> bool:
    """Whether nothing else was open on its account since it was sent."""
    return reservation.alone and state.seq == reservation.seq


def _is_price(count: int, money: int) -> bool:
    """Whether a drop of the balance is one that a single task can cause: one use, or money, or nothing."""
    return (count, money) == (1, 0) or (count == 0 and money >= 0)
