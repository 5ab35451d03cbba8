"""Callers are told to come back when a task of this kind may have ended, but neither too often nor too late."""

from __future__ import annotations

import pytest

from service.domain.tasks import Kind, State
from service.usecases.task_cache import DurationEstimator
from tests.support.tasks import CREATED_AT, make_succeeded_task, make_task


@pytest.fixture
def pace() -> DurationEstimator:
    """A process that has seen no task end yet."""
    return DurationEstimator(2.5)


def retry_after(pace: DurationEstimator, seconds: float = 0, kind: Kind = Kind.UPSCALE) -> int:
    """When to ask again about a task that has run for so many seconds."""
    return pace.retry_after(make_task(kind=kind), CREATED_AT + int(seconds * 1000))


def test_nothing_learned(pace: DurationEstimator) -> None:
    """As long as no task has ended, it is worth to ask after the time between two checks."""
    assert retry_after(pace) == 3


def test_what_is_left(pace: DurationEstimator) -> None:
    """The time is what is left of what tasks of the kind take, in whole seconds, and never less than between checks."""
    pace.record_end(make_succeeded_task(12.2))
    assert [retry_after(pace, seconds) for seconds in (0, 4, 9.7, 12, 500)] == [13, 9, 3, 3, 3]


def test_half_a_minute_at_the_most(pace: DurationEstimator) -> None:
    """Whoever waits is not sent away for longer than 30 seconds."""
    pace.record_end(make_succeeded_task(300))
    assert [retry_after(pace, seconds) for seconds in (0, 269, 280)] == [30, 30, 20]


def test_newer_ends_count_more(pace: DurationEstimator) -> None:
    """Each end moves what is known a fifth of the way, so that one that is odd does little harm."""
    pace.record_end(make_succeeded_task(10))
    pace.record_end(make_succeeded_task(20))
    assert retry_after(pace) == 12
    for _ in range(20):
        pace.record_end(make_succeeded_task(20))
    assert retry_after(pace) == 20


def test_each_kind_by_itself(pace: DurationEstimator) -> None:
    """How long one kind takes says nothing of another."""
    pace.record_end(make_succeeded_task(20))
    assert retry_after(pace, kind=Kind.SEAMLESS) == 3


def test_failures_teach_nothing(pace: DurationEstimator) -> None:
    """A task that failed at once, or was given up after long, does not count."""
    pace.record_end(make_succeeded_task(20))
    pace.record_end(make_task(state=State.FAILED, updated=CREATED_AT + 1_800_000))
    assert retry_after(pace) == 20
