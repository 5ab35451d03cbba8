"""The calendar windows in which a tenant's spending is counted.

Times are milliseconds of the ledger's clock, money is in fen.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from msgspec import Struct, field

from service.domain.task import Kind
from service.domain.tenancy import TenantPolicy, Window

COUNTED_MONEY = "money"
COUNTED_TASKS = "tasks"
MAX_ACTIVE = "max-active"


class Counter(Struct):
    """What a tenant used and holds in the window that began at `period`; `overrun` is what passed its limit."""

    period: int = 0
    tasks: int = 0
    tasks_reserved: int = 0
    money: int = 0
    money_reserved: int = 0
    overrun: int = 0


class TenantState(Struct):
    """The ledger's counters of one tenant: every window is counted, whether or not a limit stands on it.

    `active` counts what was reserved and has not ended, `kinds` the same by kind.
    """

    active: int = 0
    kinds: dict[Kind, int] = field(default_factory=dict)
    windows: dict[Window, Counter] = field(default_factory=dict)


def period_of(window: Window, now: int) -> tuple[int, int | None]:
    """When the calendar window around `now` began and when it ends, in UTC; `total` neither began nor ends."""
    if window is Window.TOTAL:
        return 0, None
    start = datetime.fromtimestamp(now // 1000, UTC).replace(second=0)
    if window is Window.MINUTE:
        end = start + timedelta(minutes=1)
    elif window is Window.HOUR:
        start = start.replace(minute=0)
        end = start + timedelta(hours=1)
    elif window is Window.DAY:
        start = start.replace(minute=0, hour=0)
        end = start + timedelta(days=1)
    else:
        start = start.replace(minute=0, hour=0, day=1)
        end = (start + timedelta(days=32)).replace(day=1)
    return int(start.timestamp()) * 1000, int(end.timestamp()) * 1000


def counter(state: TenantState, window: Window, now: int) -> Counter:
    """The counter of the window around `now`; what an earlier period counted is gone."""
    period, _ = period_of(window, now)
    found = state.windows.get(window)
    return found if found and found.period == period else Counter(period=period)


def roll(state: TenantState, now: int) -> None:
    """Begin the windows anew whose period is over."""
    state.windows = {window: counter(state, window, now) for window in Window}


def policy_name(window: Window, counted: str) -> str:
    """What a policy is called in answers and metrics, such as `day-tasks`."""
    return f"{window}-{counted}"


def policy_names(policy: TenantPolicy) -> tuple[str, ...]:
    """The names of all limits of a tenant."""
    counted = ((limit.window, limit.tasks, limit.money) for limit in policy.limits)
    names = [
        policy_name(window, unit)
        for window, tasks, money in counted
        for unit, most in ((COUNTED_TASKS, tasks), (COUNTED_MONEY, money))
        if most is not None
    ]
    return (*names, MAX_ACTIVE) if policy.max_active is not None else tuple(names)


class RateLimit(Struct, frozen=True):
    """A limit on tasks in one window as headers tell it, in seconds: the window's length, and until it resets."""

    policy: str
    limit: int
    remaining: int
    window: int | None
    resets: int | None


def rate_limits(policy: TenantPolicy, state: TenantState, now: int) -> tuple[RateLimit, ...]:
    """What is left of each limit on tasks at `now`."""
    found = []
    for limit in policy.limits:
        if limit.tasks is None:
            continue
        each, (start, end) = counter(state, limit.window, now), period_of(limit.window, now)
        left = remaining(limit.tasks, each.tasks, each.tasks_reserved)
        name = policy_name(limit.window, COUNTED_TASKS)
        if end is None:
            found.append(RateLimit(name, limit.tasks, left, None, None))
        else:
            found.append(RateLimit(name, limit.tasks, left, (end - start) // 1000, -((now - end) // 1000)))
    return tuple(found)


def remaining(limit: int, used: int, reserved: int) -> int:
    """What is left of a limit, never below zero."""
    return max(limit - used - reserved, 0)
