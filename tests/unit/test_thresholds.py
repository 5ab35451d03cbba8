"""Shares of limits: exact in integers."""

from __future__ import annotations

import pytest

from service.domain.ledger import TenantState, WindowCounter
from service.domain.tenants import Limit, TenantPolicy, Window
from service.domain.thresholds import current_thresholds, reached_thresholds

NOW = 1_790_000_000_000


@pytest.mark.parametrize(
    ("limit", "percent", "used", "is_reached"),
    [
        (3, 34, 1, False),
        (3, 33, 1, True),
        (10**12, 80, 8 * 10**11 - 1, False),
        (10**12, 80, 8 * 10**11, True),
        (1, 100, 0, False),
        (1, 100, 1, True),
        (0, 1, 0, False),  # nothing was used
        (0, 100, 1, True),  # the limit was lowered
    ],
)
def test_share(limit: int, percent: int, used: int, *, is_reached: bool) -> None:
    policy = TenantPolicy((Limit(Window.TOTAL, tasks=limit, warn_at=(percent,)),))
    state = TenantState(windows={Window.TOTAL: WindowCounter(tasks=used, tasks_reserved=limit)})
    (threshold,) = current_thresholds(policy, state, NOW)
    assert threshold.is_reached is is_reached
    assert list(reached_thresholds(policy, state, NOW)) == [threshold] * is_reached


def test_thresholds_of_an_unused_window_are_not_reached() -> None:
    """A window in which nothing has happened yet has its thresholds, for the metrics."""
    policy = TenantPolicy((Limit(Window.DAY, tasks=5, money_fen=100, warn_at=(50, 80)),))
    state = TenantState(windows={Window.DAY: WindowCounter(window_start=0, tasks=5, money_fen=100)})
    thresholds = list(current_thresholds(policy, state, NOW))
    assert [threshold.name for threshold in thresholds] == [
        *("day-tasks 50%", "day-tasks 80%", "day-money 50%", "day-money 80%")
    ]
    assert not any(threshold.is_reached for threshold in thresholds)
    assert len({threshold.event_name(tenant) for threshold in thresholds for tenant in (1, 11)}) == 8
