"""Reserving, as functions from state to decision.

A submission reserves its place in every window of its tenant before anything is sent, and settles once its outcome is
known (`service.domain.booking`). The Lua scripts carry the same rules out on Redis, where no other process can come
between; this module is their specification, the model they are held against, and the ledger of the behaviour tests.
Times are milliseconds, money is in fen. Functions change the state they are given and return what they decided; the
times of a verdict are the server's.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.domain import balance, charges
from service.domain.account import Before, Status
from service.domain.balance import Standing
from service.domain.booking import count
from service.domain.clock import Moment, shown
from service.domain.reservation import Candidate, Granted, NoAccount, PolicyDenied, Reservation, Verdict, Violation
from service.domain.task import Kind
from service.domain.tenancy import Limit, Purse, TenantPolicy, Window
from service.domain.windows import COUNTED_MONEY, COUNTED_TASKS, MAX_ACTIVE, TenantState, period_of, policy_name, roll


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
        price = balance.hold(chosen.state, chosen.policy, reservation.kind)
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
        balance.refuse(left.state, why, reservation.sent, at.now)
    chosen, retry = choose(accounts, policy.purse, reservation.kind, at.now)
    if chosen is None:
        return NoAccount(retry and shown(at, retry), at.wall)
    count(tenant, reservation, -1)
    price = balance.hold(chosen.state, chosen.policy, reservation.kind)
    violations, holds = _holds(tenant, policy.limits, price, at.wall)
    if violations:
        count(tenant, reservation, 1)
        return PolicyDenied(tuple(violations), at.wall)
    left.state.open -= 1
    left.state.sending -= 1
    charges.spare(left.state, left.policy, reservation, lacked=True)
    _aim(chosen, reservation, holds, policy.purse, at.now)
    count(tenant, reservation, 1)
    return Granted(chosen.id, at.wall, shown(at, reservation.lease))


def choose(accounts: Sequence[Candidate], purse: Purse, kind: Kind, now: int) -> tuple[Candidate | None, int | None]:
    """The first account that can take a submission; else when to look again, None if no account is valid."""
    retries: list[int] = []
    for candidate in accounts:
        found, at = balance.standing(candidate.state, candidate.policy, purse, kind, now)
        if found in {Standing.PAYS, Standing.PROBE}:
            candidate.probes = found is Standing.PROBE
            return candidate, now
        if found is Standing.EXHAUSTED:
            retries.append(at)
    return None, min(retries, default=None)


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
        state.probe_at = now + balance.PROBE_INTERVAL
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
    charges.owe(state, reservation)
    charges.expect(state, account.policy, reservation.kind, 1)
