"""Calendar windows in UTC."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.errors import RateLimit
from service.domain.ledger import (
    TenantState,
    WindowCounter,
    compute_rate_limits,
    compute_remaining,
    current_counter,
    window_bounds,
)
from service.domain.tenants import Limit, TenantPolicy, Window
from tests.model.ledger_model import roll_windows

CENTURY = st.integers(0, 4_102_444_800_000)


def parse_ms(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


@pytest.mark.parametrize(
    ("window", "start", "end"),
    [
        (Window.MINUTE, "2028-02-29T23:59:00", "2028-03-01T00:00:00"),
        (Window.HOUR, "2028-02-29T23:00:00", "2028-03-01T00:00:00"),
        (Window.DAY, "2028-02-29T00:00:00", "2028-03-01T00:00:00"),
        (Window.MONTH, "2028-02-01T00:00:00", "2028-03-01T00:00:00"),
    ],
)
def test_window_bounds(window: Window, start: str, end: str) -> None:
    assert window_bounds(window, parse_ms("2028-02-29T23:59:59.999")) == (parse_ms(start), parse_ms(end))


def test_total_window_is_unbounded() -> None:
    assert window_bounds(Window.TOTAL, parse_ms("2026-01-01T00:00:00")) == (0, None)


@given(CENTURY, st.sampled_from([item for item in Window if item is not Window.TOTAL]))
def test_windows_are_contiguous(time_ms: int, window: Window) -> None:
    start, end = window_bounds(window, time_ms)
    assert end is not None
    assert start <= time_ms < end
    assert window_bounds(window, start)[0] == start
    assert window_bounds(window, end)[0] == end


def test_expired_windows_are_cleared() -> None:
    state = TenantState()
    roll_windows(state, parse_ms("2026-12-31T23:59:59"))
    for window in state.windows.values():
        window.tasks = 1
    roll_windows(state, parse_ms("2027-01-01T00:00:00"))
    assert {window: item.tasks for window, item in state.windows.items()} == {
        Window.MINUTE: 0,
        Window.HOUR: 0,
        Window.DAY: 0,
        Window.MONTH: 0,
        Window.TOTAL: 1,
    }


def test_outdated_counter_is_not_shown() -> None:
    state = TenantState(windows={Window.DAY: WindowCounter(window_start=parse_ms("2026-05-01T00:00:00"), tasks=3)})
    assert current_counter(state, Window.DAY, parse_ms("2026-05-01T12:00:00")).tasks == 3
    assert current_counter(state, Window.DAY, parse_ms("2026-05-02T00:00:00")) == WindowCounter(
        window_start=parse_ms("2026-05-02T00:00:00")
    )


def test_rate_limit_values() -> None:
    policy = TenantPolicy(
        limits=(Limit(Window.MINUTE, tasks=5), Limit(Window.DAY, money_fen=100), Limit(Window.TOTAL, tasks=9))
    )
    now = parse_ms("2026-05-01T12:00:29.500")
    state = TenantState()
    roll_windows(state, now)
    state.windows[Window.MINUTE].tasks = 2
    state.windows[Window.MINUTE].tasks_reserved = 1
    assert compute_rate_limits(policy, state, now) == (
        RateLimit("minute-tasks", 5, 2, 60, 31),
        RateLimit("total-tasks", 9, 9, None, None),
    )


def test_remaining_is_never_negative() -> None:
    assert compute_remaining(3, 4, 1) == 0
