"""Estimates of task durations for Retry-After."""

from __future__ import annotations

import pytest

from service.domain.tasks import Kind, State
from service.usecases.task_cache import DurationEstimator
from tests.support.tasks import CREATED_AT, make_succeeded_task, make_task


@pytest.fixture
def pace() -> DurationEstimator:
    return DurationEstimator(2.5)


def retry_after(pace: DurationEstimator, seconds: float = 0, kind: Kind = Kind.UPSCALE) -> int:
    return pace.retry_after(make_task(kind=kind), CREATED_AT + int(seconds * 1000))


def test_default_is_the_poll_interval(pace: DurationEstimator) -> None:
    assert retry_after(pace) == 3


def test_remaining_time_is_rounded_up(pace: DurationEstimator) -> None:
    pace.record_end(make_succeeded_task(12.2))
    assert [retry_after(pace, seconds) for seconds in (0, 4, 9.7, 12, 500)] == [13, 9, 3, 3, 3]


def test_at_most_30_seconds(pace: DurationEstimator) -> None:
    pace.record_end(make_succeeded_task(300))
    assert [retry_after(pace, seconds) for seconds in (0, 269, 280)] == [30, 30, 20]


def test_moving_average(pace: DurationEstimator) -> None:
    """Each end moves the estimate by a fifth."""
    pace.record_end(make_succeeded_task(10))
    pace.record_end(make_succeeded_task(20))
    assert retry_after(pace) == 12
    for _ in range(20):
        pace.record_end(make_succeeded_task(20))
    assert retry_after(pace) == 20


def test_estimates_are_per_kind(pace: DurationEstimator) -> None:
    pace.record_end(make_succeeded_task(20))
    assert retry_after(pace, kind=Kind.SEAMLESS) == 3


def test_failed_tasks_are_ignored(pace: DurationEstimator) -> None:
    pace.record_end(make_succeeded_task(20))
    pace.record_end(make_task(state=State.FAILED, updated=CREATED_AT + 1_800_000))
    assert retry_after(pace) == 20
