"""Reserving and settling, as functions from state to decision.

A submission reserves its place in every window of its tenant before anything is sent, and settles once its outcome is
known. The Lua scripts carry the same rules out on Redis, where no other process can come between; this module is
their specification, the model they are held against, and the ledger of the behaviour tests. Times are milliseconds
of the ledger's clock, money is in fen. Functions change the state they are given and return what they decided.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.domain import balance
from service.domain.balance import AccountState, Before, Figures, Source, Standing, Status
from service.domain.reservation import (
    Candidate,
    Granted,
    NoAccount,
    PolicyDenied,
    Reservation,
    ReservationState,
    Verdict,
    Violation,
)
from service.domain.task import Cost, Kind
from service.domain.tenancy import Limit, Purse, TenantPolicy, Window
from service.domain.windows import COUNTED_MONEY, COUNTED_TASKS, MAX_ACTIVE, TenantState, period_of, policy_name, roll


def reserve(
    tenant: TenantState,
    policy: TenantPolicy,
    accounts: Sequence[Candidate],
    reservation: Reservation,
    now: int,
) -> Verdict:
    """Hold a place for `reservation`, which says tenant, kind and lease, on the first account that can pay.

    The tenant's policies are asked first. A refusal changes nothing.
    """
    roll(tenant, now)
    chosen, retry = choose(accounts, policy.purse, reservation.kind, now)
    violations = _violations(tenant, policy, now)
    holds: dict[Window, int] = {}
    if chosen:
        price = balance.hold(chosen.state, chosen.policy, reservation.kind)
        refused, holds = _holds(tenant, policy.limits, price, now)
        violations += refused
    if violations:
        return PolicyDenied(tuple(violations), now)
    if chosen is None:
        return NoAccount(retry, now)
    reservation.periods = {window: tenant.windows[window].period for window in Window}
    for each in tenant.windows.values():
        each.tasks_reserved += 1
    tenant.active += 1
    _aim(tenant, chosen, reservation, holds, now)
    return Granted(chosen.id, now, reservation.lease)


def retarget(
    tenant: TenantState,
    policy: TenantPolicy,
    left: Candidate,
    why: Status | None,
    accounts: Sequence[Candidate],
    reservation: Reservation,
    now: int,
) -> Verdict:
    """Move a reservation that `left` did not take to the next of `accounts`, keeping its place in the windows.

    `why` closes the account that was left; without it there was merely no connection. A refusal moves nothing: the
    reservation stays where it is, to be settled.
    """
    roll(tenant, now)
    if why:
        balance.refuse(left.state, why, reservation.sent, now)
    chosen, retry = choose(accounts, policy.purse, reservation.kind, now)
    if chosen is None:
        return NoAccount(retry, now)
    _book_money(tenant, reservation, reserved=-1)
    price = balance.hold(chosen.state, chosen.policy, reservation.kind)
    violations, holds = _holds(tenant, policy.limits, price, now)
    if violations:
        _book_money(tenant, reservation, reserved=1)
        return PolicyDenied(tuple(violations), now)
    left.state.open -= 1
    left.state.sending -= 1
    _aim(tenant, chosen, reservation, holds, now)
    return Granted(chosen.id, now, reservation.lease)


def choose(accounts: Sequence[Candidate], purse: Purse, kind: Kind, now: int) -> tuple[Candidate | None, int | None]:
    """The first account that can take a submission; else when to look again, None if no account is valid."""
    retries: list[int] = []
    for candidate in accounts:
        found, at = balance.standing(candidate.state, candidate.policy, purse, kind, now)
        if found in {Standing.PAYS, Standing.PROBE}:
            return candidate, now
        if found is Standing.EXHAUSTED:
            retries.append(at)
    return None, min(retries, default=None)


def adopt(tenant: TenantState, account: AccountState, reservation: Reservation, now: int) -> None:
    """Charge a reservation the ledger has lost as unknown, in the windows of its creation, before it is settled."""
    roll(tenant, now)
    reservation.state = ReservationState.UNKNOWN
    reservation.periods = {window: period_of(window, reservation.created)[0] for window in Window}
    _book(tenant, reservation, tasks=1)
    account.unknown += 1


def settle(
    tenant: TenantState,
    account: Candidate,
    reservation: Reservation,
    outcome: ReservationState,
    figures: Figures,
    closes: Status | None,
    now: int,
) -> bool:
    """Give a reservation its outcome; False if it had a final one already, and nothing changes.

    `figures` is what the answer told of the balance, `closes` what a refusal said of the account.
    """
    roll(tenant, now)
    was = reservation.state
    if was not in {ReservationState.RESERVED, ReservationState.UNKNOWN} or was is outcome:
        return False
    if was is ReservationState.RESERVED:
        _book(tenant, reservation, tasks_reserved=-1, active=-1)
        _book_money(tenant, reservation, reserved=-1)
        account.state.sending -= 1
        account.state.open -= 1
    else:
        _book(tenant, reservation, tasks=-1)
        _book_money(tenant, reservation, used=-1)
        account.state.unknown -= 1
    if outcome is ReservationState.ACCEPTED:
        _book(tenant, reservation, tasks=1, active=1)
        _book_money(tenant, reservation, reserved=1)
        account.state.open += 1
        reservation.after = figures
        balance.accept(account.state, reservation.sent)
        alone = reservation.alone and account.state.seq == reservation.seq
        balance.learn(account.state, reservation.before, figures, alone=alone)
    elif outcome is ReservationState.UNKNOWN:
        _book(tenant, reservation, tasks=1)
        _book_money(tenant, reservation, used=1)
        account.state.unknown += 1
    elif closes:
        balance.refuse(account.state, closes, reservation.sent, now)
    balance.observe(account.state, account.policy, figures, Source.SUBMIT, reservation.sent, now)
    reservation.state = outcome
    return True


def end(
    tenant: TenantState,
    policy: TenantPolicy,
    account: Candidate,
    reservation: Reservation,
    figures: Figures,
    sent: int,
    now: int,
    *,
    succeeded: bool,
) -> Cost:
    """Book the receipt of an accepted submission whose task has ended; `figures` were asked for at `sent`."""
    roll(tenant, now)
    balance.observe(account.state, account.policy, figures, Source.CHECK, sent, now)
    told = figures if figures.count is not None and figures.money is not None else reservation.after
    alone = reservation.alone and account.state.seq == reservation.seq
    cost = balance.receipt(
        account.state,
        account.policy,
        reservation.kind,
        reservation.before,
        told or Figures(),
        alone=alone,
        succeeded=succeeded,
    )
    _book(tenant, reservation, active=-1)
    _book_money(tenant, reservation, reserved=-1)
    account.state.open -= 1
    reservation.ended = True
    limits = {limit.window: limit.money for limit in policy.limits}
    for window, each in tenant.windows.items():
        if reservation.periods.get(window) == each.period:
            each.money += cost.money
            each.overrun += _passed(limits.get(window), each.money, cost.money)
    return cost


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
    """What each window on money has to hold for a price (None: all that remains), and those that can't."""
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
    return refused, holds


def _violation(window: Window, counted: str, limit: int, now: int) -> Violation:
    return Violation(policy_name(window, counted), limit, period_of(window, now)[1])


def _aim(tenant: TenantState, account: Candidate, reservation: Reservation, holds: dict[Window, int], now: int) -> None:
    """Point a reservation at an account, whose figures it remembers for its receipt.

    A probe remembers none: if it is taken, somebody has topped the account up since.
    """
    state = account.state
    probes = state.status is Status.EXHAUSTED
    if probes:
        state.probe_at = now + balance.PROBE_INTERVAL
    state.seq += 1
    reservation.account, reservation.sent, reservation.seq = account.id, now, state.seq
    reservation.alone = state.open == 0
    reservation.before = None
    if state.count and state.money and not probes:
        reservation.before = Before(state.count.value, state.money.value)
    reservation.holds = holds
    state.open += 1
    state.sending += 1
    _book_money(tenant, reservation, reserved=1)


def _book(
    tenant: TenantState, reservation: Reservation, *, tasks: int = 0, tasks_reserved: int = 0, active: int = 0
) -> None:
    """Count tasks in the windows that are still the ones of the reservation."""
    tenant.active += active
    for window, each in tenant.windows.items():
        if reservation.periods.get(window) == each.period:
            each.tasks += tasks
            each.tasks_reserved += tasks_reserved


def _book_money(tenant: TenantState, reservation: Reservation, *, used: int = 0, reserved: int = 0) -> None:
    for window, amount in reservation.holds.items():
        each = tenant.windows[window]
        if reservation.periods.get(window) == each.period:
            each.money += used * amount
            each.money_reserved += reserved * amount


def _passed(limit: int | None, used: int, added: int) -> int:
    """How much of what was just added lies beyond the limit."""
    return 0 if limit is None else min(max(used - limit, 0), added)
