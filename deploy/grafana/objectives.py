"""Service level objectives and their error budgets.

The events are counted by recording rules in deploy/prometheus, for alerts and dashboards alike.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from deploy.grafana.panels import COUNT, QUARTER, RATIO, Panel, falling_thresholds, figure, graph, rising_thresholds
from deploy.grafana.queries import or_zero, series

PERIOD = "30d"
"""The period of the objectives."""
FAST_WINDOW, SLOW_WINDOW = "1h", "6h"
"""The windows of a fast and a slow burn."""


class Objective(Struct, frozen=True):
    """The target share of good events over the period. `sli` is the label value of its recording rules."""

    title: str
    description: str
    target_ratio: float
    sli: str

    def good_ratio(self) -> str:
        """Return a query for the share of good events over the period, 1 without events."""
        return f"1 - ({self._bad_ratio(PERIOD)})"

    def budget_left(self) -> str:
        """Return a query for the remaining error budget: 1 if unused, negative if overdrawn."""
        return f"1 - ({self._bad_ratio(PERIOD)}) / {self._error_budget}"

    def burn_rate(self, over: str) -> str:
        """Return a query for the burn rate; at 1 the budget lasts exactly for the period."""
        return f"({self._bad_ratio(over)}) / {self._error_budget}"

    def panels(self) -> Iterable[Panel]:
        """Yield the panels of one line: good share, remaining budget, burn rate."""
        promise = f"Promised over 30 days: {100 * self.target_ratio:g}% of {self.description}."
        yield figure(
            f"{self.title}: good",
            f"{promise} Yellow where that is missed, red where by as much again.",
            RATIO,
            {"good": self.good_ratio()},
            width=QUARTER,
            steps=falling_thresholds(2 * self.target_ratio - 1, self.target_ratio),
            decimals=3,
        ).height(5)
        yield (
            figure(
                f"{self.title}: budget left",
                f"{promise} How much of what that allows to go wrong is left; below a quarter, put off what is"
                " risky, and below zero the promise is broken.",
                RATIO,
                {"left": self.budget_left()},
                width=QUARTER,
                steps=falling_thresholds(0, 0.25),
                decimals=1,
            )
            .min(-1)
            .height(5)
        )
        yield graph(
            f"{self.title}: burn rate",
            f"{promise} 1 uses the budget up exactly at the end of the period. Worry when both lines are above 6,"
            " and act at once when both are above 14.4: then a fiftieth of the budget is used within the hour.",
            COUNT,
            {FAST_WINDOW: self.burn_rate(FAST_WINDOW), SLOW_WINDOW: self.burn_rate(SLOW_WINDOW)},
            steps=rising_thresholds(6, 14.4),
        ).height(5)

    @property
    def _error_budget(self) -> str:
        return f"{1 - self.target_ratio:.4g}"

    def _bad_ratio(self, over: str) -> str:
        """Return a query for the share of bad events of the worst gateway, 0 without events."""
        ratio = f"namespace_sli:gateway_sli_bad_requests_per_requests:ratio_rate{over}"
        of_this = series(ratio, f'sli="{self.sli}"')
        return or_zero(f"max({of_this} >= 0)")


OBJECTIVES = (
    Objective(
        "Availability",
        "the tenants' requests are answered without an error (a status of 500 or more), whatever its cause",
        0.999,
        "availability",
    ),
    Objective(
        "Submissions",
        "the submissions are answered within 10 seconds, including the upload to the vendor",
        0.95,
        "submission-latency",
    ),
    Objective(
        "Reads",
        "all other requests, except those held open on purpose, are answered within 250 milliseconds",
        0.99,
        "read-latency",
    ),
)
