"""Callers are told to come back when a task of this kind may have ended, but neither too often nor too late."""

from __future__ import annotations

import pytest

from service.domain.tasks import Kind, State
from service.usecases.task_cache import Pace
from tests.support.tasks import CREATED, a_task, succeeded


@pytest.fixture
def pace() -> Pace:
    """A process that has seen no task end yet."""
    return Pace(2.5)


def after(pace: Pace, seconds: float = 0, kind: Kind = Kind.UPSCALE) -> int:
    """When to ask again about a task that has run for so many seconds."""
    return pace.retry_after(a_task(kind=kind), CREATED + int(seconds * 1000))


def test_nothing_learned(pace: Pace) -> None:
    """As long as no task has ended, it is worth to ask after the time between two checks."""
    assert after(pace) == 3


def test_what_is_left(pace: Pace) -> None:
    """The time is what is left of what tasks of the kind take, in whole seconds, and never less than between checks."""
    pace.ended(succeeded(12.2))
    assert [after(pace, seconds) for seconds in (0, 4, 9.7, 12, 500)] == [13, 9, 3, 3, 3]


def test_half_a_minute_at_the_most(pace: Pace) -> None:
    """Whoever waits is not sent away for longer than 30 seconds."""
    pace.ended(succeeded(300))
    assert [after(pace, seconds) for seconds in (0, 269, 280)] == [30, 30, 20]


def test_newer_ends_count_more(pace: Pace) -> None:
    """Each end moves what is known a fifth of the way, so that one that is odd does little harm."""
    pace.ended(succeeded(10))
    pace.ended(succeeded(20))
    assert after(pace) == 12
    for _ in range(20):
        pace.ended(succeeded(20))
    assert after(pace) == 20


def test_each_kind_by_itself(pace: Pace) -> None:
    """How long one kind takes says nothing of another."""
    pace.ended(succeeded(20))
    assert after(pace, kind=Kind.SEAMLESS) == 3


def test_failures_teach_nothing(pace: Pace) -> None:
    """A task that failed at once, or was given up after long, does not count."""
    pace.ended(succeeded(20))
    pace.ended(a_task(state=State.FAILED, updated=CREATED + 1_800_000))
    assert after(pace) == 20
