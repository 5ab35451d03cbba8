"""What the gateway promises, and how much of the room for error is used.

The events are counted by the recording rules in deploy/prometheus, for the alerts and for these dashboards alike.
"""

from __future__ import annotations

from msgspec import Struct

from deploy.grafana.queries import or_zero, series

PERIOD = "30d"
"""Over which time a promise is kept."""
FAST, SLOW = "1h", "6h"
"""The spans that show a budget burning away quickly, and steadily."""


class Objective(Struct, frozen=True):
    """Of all events this share shall be good, over the period; `sli` is what the recording rules call it."""

    title: str
    meaning: str
    share: float
    sli: str

    def good(self) -> str:
        """The share of good events over the period; all were good if there were none."""
        return f"1 - ({self._bad(PERIOD)})"

    def left(self) -> str:
        """What is left of the error budget of the period: 1 if nothing is used, below 0 if it is overdrawn."""
        return f"1 - ({self._bad(PERIOD)}) / {self._allowed}"

    def burn(self, over: str) -> str:
        """How many times faster than it may the budget is used; 1 uses it up just at the end of the period."""
        return f"({self._bad(over)}) / {self._allowed}"

    @property
    def percent(self) -> str:
        """The objective as it is said."""
        return f"{100 * self.share:g}%"

    @property
    def _allowed(self) -> str:
        return f"{1 - self.share:.4g}"

    def _bad(self, over: str) -> str:
        """The share of bad events, of the worst gateway if several are chosen; without events it is not a number."""
        ratio = f"namespace_sli:gateway_sli_bad_requests_per_requests:ratio_rate{over}"
        of_this = series(ratio, f'sli="{self.sli}"')
        return or_zero(f"max({of_this} >= 0)")


OBJECTIVES = (
    Objective(
        "Availability",
        "requests of tenants are answered without a fault (a status of 500 or more), whoever is to blame for it",
        0.999,
        "availability",
    ),
    Objective(
        "Submissions",
        "submissions are answered within 10 seconds, the upload to the vendor included",
        0.95,
        "submission-latency",
    ),
    Objective(
        "Reads",
        "other requests that do not wait on purpose are answered within 250 milliseconds",
        0.99,
        "read-latency",
    ),
)
