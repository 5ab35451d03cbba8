"""Estimates of task durations for Retry-After."""

from __future__ import annotations

import pytest

from service.domain.tasks import Kind, State
from service.usecases.caches import DurationEstimator
from tests.support.tasks import CREATED_AT, make_succeeded_task, make_task


@pytest.fixture
def estimator() -> DurationEstimator:
    return DurationEstimator(2.5)


def retry_after(estimator: DurationEstimator, seconds: float = 0, kind: Kind = Kind.UPSCALE) -> int:
    return estimator.retry_after(make_task(kind=kind), CREATED_AT + int(seconds * 1000))


def test_default_is_the_poll_interval(estimator: DurationEstimator) -> None:
    assert retry_after(estimator) == 3


def test_remaining_time_is_rounded_up(estimator: DurationEstimator) -> None:
    estimator.record_end(make_succeeded_task(12.2))
    assert [retry_after(estimator, seconds) for seconds in (0, 4, 9.7, 12, 500)] == [13, 9, 3, 3, 3]


def test_at_most_30_seconds(estimator: DurationEstimator) -> None:
    estimator.record_end(make_succeeded_task(300))
    assert [retry_after(estimator, seconds) for seconds in (0, 269, 280)] == [30, 30, 20]


def test_moving_average(estimator: DurationEstimator) -> None:
    """Each end moves the estimate by a fifth."""
    estimator.record_end(make_succeeded_task(10))
    estimator.record_end(make_succeeded_task(20))
    assert retry_after(estimator) == 12
    for _ in range(20):
        estimator.record_end(make_succeeded_task(20))
    assert retry_after(estimator) == 20


def test_estimates_are_per_kind(estimator: DurationEstimator) -> None:
    estimator.record_end(make_succeeded_task(20))
    assert retry_after(estimator, kind=Kind.SEAMLESS) == 3


def test_failed_tasks_are_ignored(estimator: DurationEstimator) -> None:
    estimator.record_end(make_succeeded_task(20))
    estimator.record_end(make_task(state=State.FAILED, updated_at=CREATED_AT + 1_800_000))
    assert retry_after(estimator) == 20
