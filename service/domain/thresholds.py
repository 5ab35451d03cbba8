"""Thresholds of limits: shares of a limit whose use is reported to the tenant."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from msgspec import Struct

from service.domain.ledger import (
    UNIT_MONEY,
    UNIT_TASKS,
    TenantState,
    WindowCounter,
    all_counters,
    compute_remaining,
    current_counter,
    policy_name,
    window_bounds,
)
from service.domain.tenants import Limit, TenantPolicy, Window

LATE_MS = 3_600_000
"""A window is reported for this long after its end: tasks that began in it may end later."""


class Threshold(Struct, frozen=True):
    """A share (percent) of a limit and the use of the limit, in tasks, or in fen where `unit` is money.

    `window_start` and `resets_at` are milliseconds; `total` is not reset.
    """

    policy: str
    unit: str
    window: Window
    window_start: int
    resets_at: int | None
    percent: int
    limit: int
    used: int
    reserved: int

    @property
    def is_reached(self) -> bool:
        """Whether what is used, without what is reserved, makes up the share; never without any use."""
        return self.used > 0 and self.used * 100 >= self.limit * self.percent

    @property
    def remaining(self) -> int:
        return compute_remaining(self.limit, self.used, self.reserved)

    @property
    def name(self) -> str:
        """Return the name of the threshold, which is the same in every window."""
        return f"{self.policy} {self.percent}%"

    def event_name(self, tenant: int) -> str:
        """Return 32 hexadecimal digits: a different name for each tenant, window and limit."""
        text = f"{tenant} {self.name} {self.window_start} {self.limit}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def current_thresholds(policy: TenantPolicy, state: TenantState, now: int) -> Iterator[Threshold]:
    """Yield the thresholds of the windows around `now`."""
    for limit in policy.limits:
        yield from _thresholds_of(limit, current_counter(state, limit.window, now))


def reached_thresholds(policy: TenantPolicy, state: TenantState, now: int) -> Iterator[Threshold]:
    """Yield the thresholds that are reached, also of windows that ended less than LATE_MS before `now`."""
    for limit in policy.limits:
        for counter in all_counters(state, limit.window):
            for threshold in _thresholds_of(limit, counter):
                is_kept = threshold.resets_at is None or now < threshold.resets_at + LATE_MS
                if is_kept and threshold.is_reached:
                    yield threshold


def _thresholds_of(limit: Limit, counter: WindowCounter) -> Iterator[Threshold]:
    if not limit.warn_at:
        return
    _, resets_at = window_bounds(limit.window, counter.window_start)
    for unit, maximum, used, reserved in (
        (UNIT_TASKS, limit.tasks, counter.tasks, counter.tasks_reserved),
        (UNIT_MONEY, limit.money_fen, counter.money_fen, counter.money_reserved_fen),
    ):
        if maximum is not None:
            for percent in limit.warn_at:
                yield Threshold(
                    policy=policy_name(limit.window, unit),
                    unit=unit,
                    window=limit.window,
                    window_start=counter.window_start,
                    resets_at=resets_at,
                    percent=percent,
                    limit=maximum,
                    used=used,
                    reserved=reserved,
                )
