"""Settling, as functions from state to decision: what becomes of a reservation, and what it is charged for.

The Lua scripts carry the same rules out on Redis, where no other process can come between; this module is their
specification, the model they are held against, and the ledger of the behaviour tests. Times are milliseconds, money is
in fen. Functions change the state they are given and return what they decided.

What a reservation counts for, in the windows and in the usage of its day, follows from the reservation alone. Each
change takes out what it counted for before and puts in what it counts for then.
"""

from __future__ import annotations

from service.domain import balance, charges
from service.domain.account import AccountState, Figures, Source, Status
from service.domain.clock import Moment
from service.domain.reservation import Candidate, Refund, Refunding, Reservation, ReservationState
from service.domain.task import Cost
from service.domain.tenancy import TenantPolicy, Window
from service.domain.usage import DayUsage, book
from service.domain.windows import TenantState, counter_of, period_of, roll

_CHARGED = frozenset({ReservationState.ACCEPTED, ReservationState.UNKNOWN})


def adopt(
    tenant: TenantState, account: AccountState, name: str, reservation: Reservation, day: DayUsage, at: Moment
) -> None:
    """Charge a reservation the ledger has lost as unknown, in the windows of its creation, before it is settled."""
    roll(tenant, at.wall)
    reservation.state, reservation.settled = ReservationState.UNKNOWN, at.now
    reservation.periods = {window: period_of(window, reservation.created)[0] for window in Window}
    count(tenant, reservation, 1)
    book(day, name, reservation, 1)
    account.unknown += 1
    account.expected.tasks += 1
    account.expected.unpriced += 1
    charges.owe(account, reservation)
    charges.stray(account, reservation, at.now + charges.UNKNOWN_SETTLES)


def settle(
    tenant: TenantState,
    account: Candidate,
    name: str,
    reservation: Reservation,
    outcome: ReservationState,
    figures: Figures,
    closes: Status | None,
    day: DayUsage,
    at: Moment,
) -> bool:
    """Give the reservation `name` its outcome; False if it had a final one already, and nothing changes.

    `figures` is what the answer told of the balance, `closes` what a refusal said of the account.
    """
    roll(tenant, at.wall)
    was, state, lacked = reservation.state, account.state, True
    if was not in {ReservationState.RESERVED, ReservationState.UNKNOWN} or was is outcome:
        return False
    count(tenant, reservation, -1)
    book(day, name, reservation, -1)
    if was is ReservationState.RESERVED:
        state.sending -= 1
        state.open -= 1
    else:
        state.unknown -= 1
        lacked = charges.found(state, reservation)
        if state.doubt and state.doubt.reservation == name:
            state.doubt = None
    reservation.state, reservation.settled = outcome, at.now
    if outcome is ReservationState.ACCEPTED:
        state.open += 1
        reservation.after = figures
        if reservation.refund:
            reservation.refund.count = reservation.refund.money = 0  # until it has ended
        balance.accept(state, reservation.sent)
        if was is ReservationState.UNKNOWN:
            charges.owe(state, reservation)
            charges.expect(state, account.policy, reservation.kind, 1)
    elif outcome is ReservationState.UNKNOWN:
        state.unknown += 1
        charges.wonder(state, name, reservation, at.now)
    else:
        reservation.holds, reservation.refund = {}, None
        charges.spare(state, account.policy, reservation, lacked=lacked)
        if closes:
            balance.refuse(state, closes, reservation.sent, at.now)
    count(tenant, reservation, 1)
    book(day, name, reservation, 1)
    balance.observe(state, account.policy, figures, Source.SUBMIT, reservation.sent, at.now, reservation.kind)
    if outcome is ReservationState.ACCEPTED:
        charges.learn(state, reservation, figures)
    return True


def end(
    tenant: TenantState,
    policy: TenantPolicy,
    account: Candidate,
    name: str,
    reservation: Reservation,
    figures: Figures,
    sent: int,
    day: DayUsage,
    at: Moment,
    *,
    succeeded: bool,
) -> Cost:
    """Book the receipt of an accepted submission whose task has ended; `figures` were asked for at `sent`.

    A check may tell the balance as it was when the task ended, which may be as long ago as its submission: where
    anything else has happened on the account since, its figures are as old, unless checks tell the balance of now.
    """
    roll(tenant, at.wall)
    count(tenant, reservation, -1)
    book(day, name, reservation, -1)
    state = account.state
    state.open -= 1
    alone = reservation.alone and state.seq == reservation.seq
    asked = min(sent if alone or state.looks else reservation.sent, at.now)
    balance.observe(state, account.policy, figures, Source.CHECK, asked, at.now)
    cost = charges.receipt(state, account.policy, reservation, figures, succeeded=succeeded)
    if succeeded:
        balance.finished(state, name, figures, min(sent, at.now))
    charges.conclude(state, reservation, figures, asked, at.now)
    reservation.holds, reservation.cost, reservation.succeeded = {}, cost, succeeded
    reservation.before = reservation.after = None
    if reservation.refund:
        reservation.refund.count, reservation.refund.money = cost.count, cost.money
    count(tenant, reservation, 1)
    book(day, name, reservation, 1)
    if not reservation.refund:
        _pass(tenant, policy, reservation, cost.money)
    return cost


def refund(
    tenant: TenantState, name: str, reservation: Reservation, reason: str, day: DayUsage, at: Moment
) -> Refunding:
    """Give what a submission was charged for back to the windows of its tenant, once.

    From then on it counts for nothing in them, whatever a late answer makes of it.
    """
    roll(tenant, at.wall)
    if reservation.refund:
        return Refunding.AGAIN
    if reservation.state in {ReservationState.REFUSED, ReservationState.NOT_SENT}:
        return Refunding.FREE
    if reservation.state is ReservationState.UNKNOWN:
        given = Refund(at.wall, reason, 0, reservation.holds.get(Window.DAY, 0))
    elif reservation.cost is None:
        return Refunding.RUNNING
    else:
        given = Refund(at.wall, reason, reservation.cost.count, reservation.cost.money)
    count(tenant, reservation, -1)
    book(day, name, reservation, -1)
    reservation.refund = given
    count(tenant, reservation, 1)
    book(day, name, reservation, 1)
    return Refunding.REFUNDED


def count(tenant: TenantState, reservation: Reservation, sign: int) -> None:
    """Put in what a reservation counts for in the windows it was counted in; with a sign of -1 take it out."""
    holds_place = reservation.state is ReservationState.RESERVED
    runs = reservation.state is ReservationState.ACCEPTED and reservation.cost is None
    charged = reservation.state in _CHARGED and not reservation.refund
    if holds_place or runs:
        tenant.active += sign
        tenant.kinds[reservation.kind] = tenant.kinds.get(reservation.kind, 0) + sign
    for window in Window:
        each = counter_of(tenant, window, reservation.periods.get(window))
        if each is None:
            continue
        held = reservation.holds.get(window, 0)
        each.tasks_reserved += sign * holds_place
        each.money_reserved += sign * held * (holds_place or runs)
        if charged:
            each.tasks += sign
            each.money += sign * (reservation.cost.money if reservation.cost else held * (not runs))


def _pass(tenant: TenantState, policy: TenantPolicy, reservation: Reservation, money: int) -> None:
    """Count how much of what was just charged lies beyond the limits."""
    for limit in policy.limits:
        each = counter_of(tenant, limit.window, reservation.periods.get(limit.window))
        if limit.money is not None and each:
            each.overrun += min(max(each.money - limit.money, 0), money)
