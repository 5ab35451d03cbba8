"""Which account can take a submission."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from service.domain.ledger import (
    AccountState,
    Candidate,
    Status,
)
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, Purse

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


def choose(accounts: Sequence[Candidate], purse: Purse, kind: Kind, now: int) -> tuple[Candidate | None, int | None]:
    """The first account that can take a submission; else when to look again, None if no account is valid."""
    retries: list[int] = []
    for candidate in accounts:
        found, at = standing(candidate.state, candidate.policy, purse, kind, now)
        if found in {Standing.PAYS, Standing.PROBE}:
            candidate.probes = found is Standing.PROBE
            return candidate, now
        if found is Standing.EXHAUSTED:
            retries.append(at)
    return None, min(retries, default=None)
