"""Which account can take a submission."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from service.domain.ledger import AccountState, AccountStatus, Candidate
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, SpendingMode

PROBE_INTERVAL_MS = 60_000
"""An exhausted account is checked at most once per interval."""
MAX_FAILED_BALANCE_CHECKS = 5
"""After so many balance checks without a result, ordinary submissions probe an exhausted account again."""
EXCLUSIVE_RETRY_MS = 2_000
"""`Retry-After` of a `count_only` tenant while the balance is unknown and one submission is open."""


class Availability(StrEnum):
    AVAILABLE = "available"
    PROBE = "probe"
    EXHAUSTED = "exhausted"
    INVALID = "invalid"


def account_availability(
    state: AccountState, policy: AccountPolicy, spending_mode: SpendingMode, kind: Kind, now: int
) -> tuple[Availability, int]:
    """Return whether the account can take one more submission, and when to try again if not."""
    if state.status is AccountStatus.INVALID:
        return Availability.INVALID, 0
    exhausted = state.status is AccountStatus.EXHAUSTED
    if not exhausted and _can_pay(state, policy, spending_mode, kind):
        return Availability.AVAILABLE, now
    is_waiting = exhausted or _needs_balance_check(state)
    if is_waiting and _can_probe(state, policy, spending_mode) and now >= state.next_probe_at:
        return Availability.PROBE, now
    retry_at = now + EXCLUSIVE_RETRY_MS
    if _has_live_balance_check(state) and (exhausted or state.open_submissions == 0):
        retry_at = max(state.last_balance_check_at + PROBE_INTERVAL_MS, retry_at)
    elif is_waiting:
        retry_at = max(state.next_probe_at, retry_at)
    return Availability.EXHAUSTED, retry_at


def _has_live_balance_check(state: AccountState) -> bool:
    """Whether the balance can be read at no cost."""
    return (
        state.live_balance_checks
        and state.last_finished_task is not None
        and state.failed_balance_checks < MAX_FAILED_BALANCE_CHECKS
    )


def _can_pay(state: AccountState, policy: AccountPolicy, spending_mode: SpendingMode, kind: Kind) -> bool:
    if spending_mode is not SpendingMode.COUNT_ONLY:
        max_price = policy.max_price.get(kind, state.max_observed_price.get(kind, 0))
        return _stays_above_floors(state, policy, max_price, state.unaccounted_charges)
    if state.count is None:
        return state.open_submissions == 0
    return state.count.value - max(state.open_submissions, state.unaccounted_charges) > policy.floor_count


def _stays_above_floors(state: AccountState, policy: AccountPolicy, price: int | None, submissions: int) -> bool:
    """Whether the known balance less unaccounted submissions stays above the floors.

    `price` is that of one more submission (0 if unknown, None for none). Any open submission may be overtaken by a
    cheaper one. Prepaid uses are spent before money, so money does not help while reserved uses remain, or while a
    submission is open that must not take money.
    """
    if state.count is None:
        return True
    uses_left = state.count.value - submissions
    if uses_left > 0 or (state.count.value > 0 and policy.floor_count > 0):
        return uses_left > policy.floor_count
    if price is not None and state.pending_prepaid_only:
        return False
    if state.money is None:
        return True
    price = price or 0
    price_each = _max_price_any_kind(state, policy) if submissions else price
    if policy.floor_money_fen and state.money.value + (uses_left - 1) * price_each < policy.floor_money_fen:
        return False
    return state.money.value + uses_left * price > policy.floor_money_fen


def _max_price_any_kind(state: AccountState, policy: AccountPolicy) -> int:
    return max((*policy.max_price.values(), *state.max_observed_price.values()), default=0)


def _needs_balance_check(state: AccountState) -> bool:
    """Whether only submissions that ended are missing in the balance: no open one will update it."""
    return state.open_submissions == 0 and state.untracked_charges > 0


def _can_probe(state: AccountState, policy: AccountPolicy, spending_mode: SpendingMode) -> bool:
    """Whether an ordinary submission may probe an exhausted account.

    Not if only prepaid uses may be spent, if the balance can be read at no cost, or if a figure shows that a probe
    would go below a floor.
    """
    if spending_mode is SpendingMode.COUNT_ONLY or _has_live_balance_check(state):
        return False
    readings = ((state.count, policy.floor_count), (state.money, policy.floor_money_fen))
    return not any(reading and reading.value > 0 and floor > 0 for reading, floor in readings)


def choose_account(
    accounts: Sequence[Candidate], spending_mode: SpendingMode, kind: Kind, now: int
) -> tuple[Candidate | None, int | None]:
    """Return the first account that can take a submission; else None and when to retry (None if none is valid)."""
    retry_times: list[int] = []
    for candidate in accounts:
        availability, retry_at = account_availability(candidate.state, candidate.policy, spending_mode, kind, now)
        if availability in {Availability.AVAILABLE, Availability.PROBE}:
            candidate.is_probe = availability is Availability.PROBE
            return candidate, now
        if availability is Availability.EXHAUSTED:
            retry_times.append(retry_at)
    return None, min(retry_times, default=None)
