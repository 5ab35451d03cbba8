"""Decides from series of samples whether something rises: robust slopes with their confidence, and their limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations, pairwise
from statistics import NormalDist, median

CONFIDENCE = 0.95
_MAX_BLOCKS = 24
"""Samples that follow each other are alike, and would make the interval too narrow: medians of blocks are not."""


@dataclass(frozen=True)
class Slope:
    """The rise of y for one unit of x, and the bounds between which it is with CONFIDENCE."""

    estimate: float
    low: float
    high: float


class Outcome(StrEnum):
    OK = "ok"
    """Below the limit with CONFIDENCE."""
    UNCERTAIN = "uncertain"
    """The limit is within the bounds: a longer run would narrow them."""
    FAILED = "FAILED"
    """Above the limit with CONFIDENCE."""


@dataclass(frozen=True)
class Verdict:
    """A figure with its limit, in a unit."""

    name: str
    unit: str
    limit: float
    slope: Slope

    @property
    def outcome(self) -> Outcome:
        if self.slope.low > self.limit:
            return Outcome.FAILED
        return Outcome.OK if self.slope.high <= self.limit else Outcome.UNCERTAIN


def judge(name: str, unit: str, limit: float, points: Sequence[tuple[float, float]], *, per: float = 1) -> Verdict:
    """Compare the rise of y for each `per` of x with a limit. Needs two points with different x."""
    slope = estimate_slope(take_medians(points))
    return Verdict(name, unit, limit, Slope(slope.estimate * per, slope.low * per, slope.high * per))


def take_medians(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Replace blocks of points that follow each other by their medians."""
    blocks = min(_MAX_BLOCKS, len(points))
    edges = [round(len(points) * block / blocks) for block in range(blocks + 1)]
    parts = [points[start:end] for start, end in pairwise(edges)]
    return [(median(x for x, _ in part), median(y for _, y in part)) for part in parts]


def estimate_slope(points: Sequence[tuple[float, float]]) -> Slope:
    """Return the median of the slopes between all pairs (Theil and Sen), with the bounds of Sen (1968).

    A few outliers, such as a memory peak, change it little. Of too few points, the bounds are infinite.
    """
    slopes = sorted((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x1 != x2)
    variance = len(points) * (len(points) - 1) * (2 * len(points) + 5) / 18
    spread = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(variance)
    low = math.floor((len(slopes) - spread) / 2)
    high = math.ceil((len(slopes) + spread) / 2)
    if low < 0:
        return Slope(median(slopes), -math.inf, math.inf)
    return Slope(median(slopes), slopes[low], slopes[min(high, len(slopes) - 1)])
