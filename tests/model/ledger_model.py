"""The ledger's rules in Python: the oracle of the property tests of the Lua scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from service.domain import availability
from service.domain.availability import PROBE_INTERVAL, _can_pay, _dearest, _is_stuck, choose
from service.domain.ledger import (
    COUNTED_MONEY,
    COUNTED_TASKS,
    MAX_ACTIVE,
    AccountState,
    Before,
    Candidate,
    DayUsage,
    Doubt,
    Expected,
    Figure,
    Figures,
    Granted,
    Measure,
    Moment,
    Newest,
    NoAccount,
    PolicyDenied,
    Refund,
    Refunding,
    Reservation,
    ReservationState,
    Source,
    Status,
    Suggestion,
    Tally,
    TenantState,
    Verdict,
    Violation,
    WindowCounter,
    _counters,
    current_counter,
    period_of,
    policy_name,
)
from service.domain.tasks import Basis, Cost, Kind
from service.domain.tenants import AccountPolicy, Limit, Purse, TenantPolicy, Window

_COSTS = {
    Basis.OBSERVED: (Measure.OBSERVED_COUNT, Measure.OBSERVED_MONEY),
    Basis.ESTIMATED: (Measure.ESTIMATED_COUNT, Measure.ESTIMATED_MONEY),
}


def book(day: DayUsage, name: str, reservation: Reservation, sign: int) -> None:
    """Put in what the reservation `name` counts for, or (with a sign of -1) take it out."""
    tally = day.tallies.setdefault(reservation.kind, Tally())
    for measure, change in _tally(reservation).items():
        tally[measure] += sign * change
    if reservation.state is ReservationState.UNKNOWN:
        day.unknown[name] = reservation.kind
        if sign < 0:
            del day.unknown[name]
    if reservation.refund:
        day.refunds[name] = reservation.kind, msgspec.structs.replace(reservation.refund)
        if sign < 0:
            del day.refunds[name]


def _tally(reservation: Reservation) -> Tally:
    """What a reservation counts for, which follows from it alone."""
    tally = Tally()
    match reservation.state:
        case ReservationState.RESERVED:
            pass
        case ReservationState.REFUSED:
            tally[Measure.REFUSED] = 1
        case ReservationState.NOT_SENT:
            tally[Measure.NOT_SENT] = 1
        case ReservationState.UNKNOWN:
            tally[Measure.UNKNOWN] = 1
            tally[Measure.UNKNOWN_MONEY] = reservation.holds.get(Window.DAY, 0)
        case ReservationState.ACCEPTED:
            cost = reservation.cost
            if cost is None:
                tally[Measure.RUNNING] = 1
            else:
                tally[Measure.SUCCEEDED if reservation.succeeded else Measure.FAILED] = 1
            if cost and cost.basis in _COSTS:
                uses, money = _COSTS[cost.basis]
                tally[uses], tally[money] = cost.count, cost.money
            elif cost:
                tally[Measure.UNKNOWN_COST] = 1
    if reservation.refund:
        tally[Measure.REFUNDED] = 1
        tally[Measure.REFUNDED_COUNT] = reservation.refund.count
        tally[Measure.REFUNDED_MONEY] = reservation.refund.money
    return tally


def roll(state: TenantState, now: int) -> None:
    """Begin the windows anew whose period is over.

    The clock may step back into an earlier period, so the counter of the last one is set aside, as are those of later
    ones where it has. An earlier one whose counter is not kept, and which may have been counted before, is counted
    under another name.
    """
    for window in Window:
        period, _ = period_of(window, now)
        if window in state.windows and state.windows[window].period == period:
            continue
        known = _counters(state, window)
        later = [each for each in known if each.period > period]
        last = max((each for each in known if each.period < period), key=lambda each: each.period, default=None)
        begun = current_counter(state, window, now)
        if later and begun not in known:
            state.names += 1
            begun.name = -state.names
        aside = [*later, last] if last else later
        state.windows[window] = begun
        state.aside = {each: kept for each, kept in (state.aside | {window: aside}).items() if kept}


def counter_of(state: TenantState, window: Window, key: int | None) -> WindowCounter | None:
    """The counter of a window that reservations know by a key, if there still is one."""
    return next((each for each in _counters(state, window) if each.key == key), None)


def shown(moment: Moment, at: int) -> int:
    """A time of the ledger in the server's time; 0 stands for never, and stays so."""
    return at and at - moment.offset


_RECEIVER = re.compile(r"[a-z]+://([^/:?]+)")


_DIGITS = re.compile(r"[0-9.]+")


def receiver(tenant: int, url: str) -> str:
    """Whom the deliveries to an address may keep waiting: a tenant's others at the same host.

    Ports make no difference, and addresses without a name are all one, so that a tenant has no more receivers than
    hosts on its list: each of them may occupy a part of what is sent at once.
    """
    host = _RECEIVER.match(url)
    name = host[1] if host else ""
    return f"{tenant}:{'ip' if name.startswith('[') or _DIGITS.fullmatch(name) else name}"


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
    resolve(state, figures, source, sent, kind)
    begins = state.count is None or state.money is None
    count, state.count = _observed(state.count, figures.count, source, sent, received)
    money, state.money = _observed(state.money, figures.money, source, sent, received)
    if sent > state.rose:
        explain(state, max(-count, 0), max(-money, 0))
    catch_up(state, figures, sent, received)
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
    owe(account, reservation)
    stray(account, reservation, at.now + UNKNOWN_SETTLES)


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
        lacked = found(state, reservation)
        if state.doubt and state.doubt.reservation == name:
            state.doubt = None
    reservation.state, reservation.settled = outcome, at.now
    if outcome is ReservationState.ACCEPTED:
        state.open += 1
        reservation.after = figures
        if reservation.refund:
            reservation.refund.count = reservation.refund.money = 0  # until it has ended
        accept(state, reservation.sent)
        if was is ReservationState.UNKNOWN:
            owe(state, reservation)
            expect(state, account.policy, reservation.kind, 1)
    elif outcome is ReservationState.UNKNOWN:
        state.unknown += 1
        wonder(state, name, reservation, at.now)
    else:
        reservation.holds, reservation.refund = {}, None
        spare(state, account.policy, reservation, lacked=lacked)
        if closes:
            refuse(state, closes, reservation.sent, at.now)
    count(tenant, reservation, 1)
    book(day, name, reservation, 1)
    observe(state, account.policy, figures, Source.SUBMIT, reservation.sent, at.now, reservation.kind)
    if outcome is ReservationState.ACCEPTED:
        learn(state, reservation, figures)
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
    observe(state, account.policy, figures, Source.CHECK, asked, at.now)
    cost = receipt(state, account.policy, reservation, figures, succeeded=succeeded)
    if succeeded:
        finished(state, name, figures, min(sent, at.now))
    conclude(state, reservation, figures, asked, at.now)
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


def reserve(
    tenant: TenantState,
    policy: TenantPolicy,
    accounts: Sequence[Candidate],
    reservation: Reservation,
    at: Moment,
) -> Verdict:
    """Hold a place for `reservation`, which says tenant, kind and lease, on the first account that can pay.

    The tenant's policies are asked first. A refusal changes nothing.
    """
    roll(tenant, at.wall)
    chosen, retry = choose(accounts, policy.purse, reservation.kind, at.now)
    violations = _violations(tenant, policy, at.wall)
    holds: dict[Window, int] = {}
    if chosen:
        price = hold(chosen.state, chosen.policy, reservation.kind)
        refused, holds = _holds(tenant, policy.limits, price, at.wall)
        violations += refused
    if violations:
        return PolicyDenied(tuple(violations), at.wall)
    if chosen is None:
        return NoAccount(retry and shown(at, retry), at.wall)
    reservation.periods = {window: tenant.windows[window].key for window in Window}
    _aim(chosen, reservation, holds, policy.purse, at.now)
    count(tenant, reservation, 1)
    return Granted(chosen.id, at.wall, shown(at, reservation.lease))


def retarget(
    tenant: TenantState,
    policy: TenantPolicy,
    left: Candidate,
    why: Status | None,
    accounts: Sequence[Candidate],
    reservation: Reservation,
    at: Moment,
) -> Verdict:
    """Move a reservation that `left` did not take to the next of `accounts`, keeping its place in the windows.

    `why` closes the account that was left; without it there was merely no connection. A refusal moves nothing: the
    reservation stays where it is, to be settled.
    """
    roll(tenant, at.wall)
    if why:
        refuse(left.state, why, reservation.sent, at.now)
    chosen, retry = choose(accounts, policy.purse, reservation.kind, at.now)
    if chosen is None:
        return NoAccount(retry and shown(at, retry), at.wall)
    count(tenant, reservation, -1)
    price = hold(chosen.state, chosen.policy, reservation.kind)
    violations, holds = _holds(tenant, policy.limits, price, at.wall)
    if violations:
        count(tenant, reservation, 1)
        return PolicyDenied(tuple(violations), at.wall)
    left.state.open -= 1
    left.state.sending -= 1
    spare(left.state, left.policy, reservation, lacked=True)
    _aim(chosen, reservation, holds, policy.purse, at.now)
    count(tenant, reservation, 1)
    return Granted(chosen.id, at.wall, shown(at, reservation.lease))


def _violations(tenant: TenantState, policy: TenantPolicy, now: int) -> list[Violation]:
    found = []
    for limit in policy.limits:
        if limit.tasks is None:
            continue
        each = tenant.windows[limit.window]
        if each.tasks + each.tasks_reserved >= limit.tasks:
            found.append(_violation(limit.window, COUNTED_TASKS, limit.tasks, now))
    if policy.max_active is not None and tenant.active >= policy.max_active:
        found.append(Violation(MAX_ACTIVE, policy.max_active, None))
    return found


def _holds(
    tenant: TenantState, limits: Sequence[Limit], price: int | None, now: int
) -> tuple[list[Violation], dict[Window, int]]:
    """What each window has to hold for a price, and the limits on money that can't.

    Without a known price a limited window holds all that remains of it, and one without a limit the most of those: each
    is counted, so that a limit added later starts right.
    """
    refused: list[Violation] = []
    holds: dict[Window, int] = {}
    for limit in limits:
        if limit.money is None:
            continue
        each = tenant.windows[limit.window]
        remaining = limit.money - each.money - each.money_reserved
        wanted = max(remaining, 1) if price is None else price
        if wanted > max(remaining, 0):
            refused.append(_violation(limit.window, COUNTED_MONEY, limit.money, now))
        holds[limit.window] = wanted
    elsewhere = max(holds.values(), default=0) if price is None else price
    holds = {window: holds.get(window, elsewhere) for window in Window}
    return refused, holds if any(holds.values()) else {}


def _violation(window: Window, counted: str, limit: int, now: int) -> Violation:
    return Violation(policy_name(window, counted), limit, period_of(window, now)[1])


def _aim(account: Candidate, reservation: Reservation, holds: dict[Window, int], purse: Purse, now: int) -> None:
    """Point a reservation at an account, whose figures it remembers for its receipt.

    A probe remembers none: if it is taken, somebody has topped the account up since.
    """
    state = account.state
    if account.probes:
        state.probe_at = now + availability.PROBE_INTERVAL
    state.seq += 1
    reservation.account, reservation.sent, reservation.seq = account.id, now, state.seq
    reservation.alone, reservation.clean = state.open == 0, state.missing == 0
    reservation.use = state.count.value > state.missing if state.count else None
    reservation.thrifty = purse is Purse.COUNT_ONLY
    reservation.before = None
    if state.count and state.money and not account.probes:
        reservation.before = Before(state.count.value, state.money.value)
    reservation.holds = holds
    state.open += 1
    state.sending += 1
    owe(state, reservation)
    expect(state, account.policy, reservation.kind, 1)


LONGEST = 30_000
"""Nobody who asks anew finds a task that was checked longer ago than this."""


LONGEST_BACKOFF = 60_000


_SHARE_OF_AGE = 20


def check_after(poll: int, age: int, misses: int, *, interesting: bool) -> int:
    """How long after a check the next one is due: `poll` at the least.

    A task that somebody looks at or waits for (`interesting`) is checked each time; else the less often the older it
    is, as what ran for minutes may run for more. Checks that failed in a row (`misses`) are repeated ever later.
    """
    if misses:
        return min(poll << misses, max(LONGEST_BACKOFF, poll))
    if interesting:
        return poll
    return max(min(age // _SHARE_OF_AGE, LONGEST), poll)
