"""Which account can take a submission."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from service.domain.ledger import (
    AccountState,
    AccountStatus,
    Candidate,
)
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, SpendingMode

PROBE_INTERVAL_MS = 60_000
"""An exhausted account is looked at once in this many milliseconds."""


MAX_FAILED_BALANCE_CHECKS = 5
"""After so many looks that told nothing, ordinary submissions test an exhausted account again."""


EXCLUSIVE_RETRY_MS = 2_000
"""When a `count_only` tenant waits for the balance to become known, it is told to come back after this."""


class Availability(StrEnum):
    """Whether an account can take a submission now."""

    AVAILABLE = "available"
    PROBE = "probe"
    EXHAUSTED = "exhausted"
    INVALID = "invalid"


def account_availability(
    state: AccountState, policy: AccountPolicy, spending_mode: SpendingMode, kind: Kind, now: int
) -> tuple[Availability, int]:
    """Whether the account can take one more submission, and when to look again if it can't."""
    if state.status is AccountStatus.INVALID:
        return Availability.INVALID, 0
    exhausted = state.status is AccountStatus.EXHAUSTED
    if not exhausted and _can_pay(state, policy, spending_mode, kind):
        return Availability.AVAILABLE, now
    waits = exhausted or _needs_balance_check(state)
    if waits and _can_probe(state, policy, spending_mode) and now >= state.next_probe_at:
        return Availability.PROBE, now
    at = now + EXCLUSIVE_RETRY_MS
    if _has_live_balance_check(state) and (exhausted or state.open_submissions == 0):
        at = max(state.last_balance_check_at + PROBE_INTERVAL_MS, at)
    elif waits:
        at = max(state.next_probe_at, at)
    return Availability.EXHAUSTED, at


def _has_live_balance_check(state: AccountState) -> bool:
    """Whether the balance can be read without spending any."""
    return (
        state.live_balance_checks
        and state.last_finished_task is not None
        and state.failed_balance_checks < MAX_FAILED_BALANCE_CHECKS
    )


def _can_pay(state: AccountState, policy: AccountPolicy, spending_mode: SpendingMode, kind: Kind) -> bool:
    """Whether an open account can pay for one more submission out of this purse."""
    if spending_mode is not SpendingMode.COUNT_ONLY:
        return _stays_above_floors(state, policy, _max_price_of_kind(state, policy, kind), state.unaccounted_charges)
    if state.count is None:
        return state.open_submissions == 0
    return state.count.value - max(state.open_submissions, state.unaccounted_charges) > policy.floor_count


def _stays_above_floors(state: AccountState, policy: AccountPolicy, price: int | None, submissions: int) -> bool:
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
    if price is not None and state.pending_prepaid_only:
        return False
    if state.money is None:
        return True
    price = price or 0
    each = _max_price_any_kind(state, policy) if submissions else price
    if policy.floor_money_fen and state.money.value + (left - 1) * each < policy.floor_money_fen:
        return False
    return state.money.value + left * price > policy.floor_money_fen


def _max_price_of_kind(state: AccountState, policy: AccountPolicy, kind: Kind) -> int:
    """What a task of a kind takes at the most, in fen; 0 where nobody knows."""
    return policy.max_price.get(kind, state.max_observed_price.get(kind, 0))


def _max_price_any_kind(state: AccountState, policy: AccountPolicy) -> int:
    """What a task of any kind takes at the most, in fen."""
    return max((*policy.max_price.values(), *state.max_observed_price.values()), default=0)


def _needs_balance_check(state: AccountState) -> bool:
    """Whether the figures may lack submissions that have ended, so that none of these will tell any more."""
    return state.open_submissions == 0 and state.untracked_charges > 0


def _can_probe(state: AccountState, policy: AccountPolicy, spending_mode: SpendingMode) -> bool:
    """Whether an ordinary submission may test an exhausted account.

    Not where only the count may be spent, not where the balance can be read for nothing, and not where the probe would
    eat into a floor that the figures still show.
    """
    if spending_mode is SpendingMode.COUNT_ONLY or _has_live_balance_check(state):
        return False
    below_floor = [
        figure.value > 0 and floor > 0
        for figure, floor in ((state.count, policy.floor_count), (state.money, policy.floor_money_fen))
        if figure
    ]
    return not any(below_floor)


def choose_account(
    accounts: Sequence[Candidate], spending_mode: SpendingMode, kind: Kind, now: int
) -> tuple[Candidate | None, int | None]:
    """The first account that can take a submission; else when to look again, None if no account is valid."""
    retries: list[int] = []
    for candidate in accounts:
        found, at = account_availability(candidate.state, candidate.policy, spending_mode, kind, now)
        if found in {Availability.AVAILABLE, Availability.PROBE}:
            candidate.is_probe = found is Availability.PROBE
            return candidate, now
        if found is Availability.EXHAUSTED:
            retries.append(at)
    return None, min(retries, default=None)
