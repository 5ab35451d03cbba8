"""The verdict on series: a leak fails, noise and single peaks do not, and a short series is uncertain."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.soak.verdict import Outcome, estimate_slope, judge

MINUTES = 10


def sample(value_at: Callable[[float], float], *, noise: float = 0, seconds: int = 600) -> list[tuple[float, float]]:
    """Return samples of each 5 s with Gaussian noise."""
    randomness = random.Random(1)
    return [(float(at), value_at(at) + randomness.gauss(0, noise)) for at in range(0, seconds, 5)]


def judge_memory(points: list[tuple[float, float]]) -> Outcome:
    return judge("memory", "MB per 10 min", 1, points, per=60 * MINUTES).outcome


def test_slope_is_that_of_a_line_despite_outliers() -> None:
    points = sample(lambda at: 100 + 0.01 * at)
    points[::10] = [(x, y + 500) for x, y in points[::10]]
    slope = estimate_slope(points)
    assert slope.estimate == pytest.approx(0.01, rel=0.05)
    assert slope.low <= slope.estimate <= slope.high


@pytest.mark.parametrize(
    ("rise", "noise", "expected"),
    [
        (0, 0, Outcome.OK),
        (0, 1, Outcome.OK),
        (-20, 1, Outcome.OK),
        (0.5, 0.1, Outcome.OK),
        (1, 5, Outcome.UNCERTAIN),
        (3, 0.5, Outcome.FAILED),
        (20, 5, Outcome.FAILED),
    ],
)
def test_rise_of_memory(rise: float, noise: float, expected: Outcome) -> None:
    """Of a rise in MB within the time, with noise of MB."""
    assert judge_memory(sample(lambda at: 120 + rise * at / 600, noise=noise)) is expected


def test_peaks_and_levels_of_noise_are_no_leak() -> None:
    assert judge_memory([(x, y + 80 * (x % 100 == 0)) for x, y in sample(lambda _: 120, noise=0.2)]) is Outcome.OK
    assert judge_memory(sample(lambda at: 120 + 4 * (at // 60 % 2))) is not Outcome.FAILED


def test_steps_that_go_on_are_a_leak() -> None:
    assert judge_memory(sample(lambda at: 120 + 2 * (at // 60))) is Outcome.FAILED


def test_few_samples_prove_nothing() -> None:
    assert judge_memory(sample(lambda at: 120 + at / 100, seconds=15)) is Outcome.UNCERTAIN
