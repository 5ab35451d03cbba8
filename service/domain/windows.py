"""The calendar windows in which a tenant's spending is counted.

Times are milliseconds of the server's clock, money is in fen.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from msgspec import Struct, field

from service.domain.task import Kind
from service.domain.tenancy import TenantPolicy, Window

COUNTED_MONEY = "money"
COUNTED_TASKS = "tasks"
MAX_ACTIVE = "max-active"


class WindowCounter(Struct):
    """What a tenant used and holds in the window that began at `period`; `overrun` is what passed its limit.

    `name` tells it from an earlier counter of the same period, where the server's clock stepped back into that.
    """

    period: int = 0
    tasks: int = 0
    tasks_reserved: int = 0
    money: int = 0
    money_reserved: int = 0
    overrun: int = 0
    name: int | None = None

    @property
    def key(self) -> int:
        """What reservations that were counted in it know it by."""
        return self.period if self.name is None else self.name


class TenantState(Struct):
    """The ledger's counters of one tenant: every window is counted, whether or not a limit stands on it.

    `active` counts what was reserved and has not ended, `kinds` the same by kind. `aside` keeps the counter of the last
    period, as the server's clock may step back into that, and of later periods where it has, until these come again;
    `names` counts those that got a name.
    """

    active: int = 0
    kinds: dict[Kind, int] = field(default_factory=dict)
    windows: dict[Window, WindowCounter] = field(default_factory=dict)
    aside: dict[Window, list[WindowCounter]] = field(default_factory=dict)
    names: int = 0


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


def current_counter(state: TenantState, window: Window, now: int) -> WindowCounter:
    """The counter of the window around `now`, which what was counted in other periods is no part of."""
    period, _ = period_of(window, now)
    found = (each for each in _counters(state, window) if each.period == period)
    return next(found, WindowCounter(period=period))


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


def _counters(state: TenantState, window: Window) -> list[WindowCounter]:
    """The counters of a window: those that were set aside, then that of now."""
    now = state.windows.get(window)
    return [*state.aside.get(window, []), *([now] if now else [])]


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
        each, (start, end) = current_counter(state, limit.window, now), period_of(limit.window, now)
        left = compute_remaining(limit.tasks, each.tasks, each.tasks_reserved)
        name = policy_name(limit.window, COUNTED_TASKS)
        if end is None:
            found.append(RateLimit(name, limit.tasks, left, None, None))
        else:
            found.append(RateLimit(name, limit.tasks, left, (end - start) // 1000, -((now - end) // 1000)))
    return tuple(found)


def compute_remaining(limit: int, used: int, reserved: int) -> int:
    """What is left of a limit, never below zero."""
    return max(limit - used - reserved, 0)
