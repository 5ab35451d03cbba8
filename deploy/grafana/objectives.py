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
        target = f"Objective over 30 days: {100 * self.target_ratio:g}% of {self.description}."
        yield figure(
            f"{self.title}: good",
            f"{target} Yellow if it is missed, red if by twice the budget.",
            RATIO,
            {"good": self.good_ratio()},
            width=QUARTER,
            steps=falling_thresholds(2 * self.target_ratio - 1, self.target_ratio),
            decimals=3,
        ).height(5)
        yield (
            figure(
                f"{self.title}: budget left",
                f"{target} The unused share of the error budget; below a quarter, postpone risky changes; below zero"
                " the objective is missed.",
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
            f"{target} At 1 the budget lasts exactly for the period. Worry when both lines are above 6; above 14.4,"
            " drop everything else: a fiftieth of the budget is used within the hour.",
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
        "the tenants' requests get a status below 500, whatever the cause",
        0.999,
        "availability",
    ),
    Objective(
        "Submissions",
        "the submissions get a response within 10 seconds, the upload to the vendor included",
        0.95,
        "submission-latency",
    ),
    Objective(
        "Reads",
        "all other requests, except long-lived ones, get a response within 250 milliseconds",
        0.99,
        "read-latency",
    ),
)
