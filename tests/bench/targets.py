"""The figures that the gateway has to reach, and the table of those reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.bench.comparison import ALL, ALONE, API, FASTAPI, LUA, OTHER, Result
from tests.bench.overload import CAPACITY, OVERLOADS, PROBED
from tests.bench.stored_tasks import (
    CHECKS_BESIDE,
    FILTER,
    LIST,
    POLLER,
    READ_BESIDE,
    READ_MANY,
    STORE,
    SUBMIT_BESIDE,
)
from tests.bench.workloads import (
    IDLE,
    LARGE_ROWS,
    LARGE_SUBMIT,
    READ,
    SCRAPE,
    SCRAPED_READ,
    SLOW_READ,
    SLOW_SUBMIT,
    SMALL_SUBMIT,
)

BY_CPU = " by CPU"
"""The end of the name of a ratio of CPU times."""


@dataclass(frozen=True)
class Target:
    """A figure of a row; a ratio of rates (`x ...`) has to be at least `bound`, any other figure at most.

    Without a bound it is only reported. `connections` 0 is for rows without a number of them.
    """

    row: str
    figure: str
    bound: float | None = None
    aim: float | None = None
    server: str = API
    connections: int = 0

    @property
    def text(self) -> str:
        place = f"{self.row}, role {self.server}" if self.server != API else self.row
        if self.connections:
            place += f", {self.connections} connection{'s' * (self.connections > 1)}"
        return f"{place}: {name_figure(self.figure)}"

    def is_reached(self, value: float, bound: float | None) -> bool:
        return bound is not None and (value >= bound if self.figure.startswith("x ") else value <= bound)

    def find(self, results: Sequence[Result], label: str = "") -> float:
        """Return the figure of this checkout, or of that with the label; NaN if it was not measured."""
        place = self.row, f"{self.server} ({label})" if label else self.server, self.connections
        found = [item for item in results if (item.row, item.server, item.connections) == place]
        return found[0].figures.get(self.figure, math.nan) if found else math.nan


_ROWS = (READ, SMALL_SUBMIT, LARGE_SUBMIT)
TARGETS = (
    Target(READ, f"x {LUA}", 0.15, 0.20, connections=16),
    Target(READ, f"x {FASTAPI}", 5.5, connections=16),
    Target(READ, "p99_ms", 5, 3, connections=16),
    Target(READ_MANY, f"x {LUA}", 0.10, 0.15, connections=16),
    Target(SMALL_SUBMIT, f"x {LUA}", 0.10, 0.20, connections=16),
    Target(SMALL_SUBMIT, f"x {FASTAPI}", 3.1, connections=16),
    Target(SMALL_SUBMIT, "x 16 connections", 0.9, connections=64),
    Target(LARGE_SUBMIT, f"x {LUA}", 0.30, 0.42, connections=16),
    Target(LARGE_SUBMIT, f"x {FASTAPI}", 2.2, connections=16),
    Target(LARGE_ROWS[32], "peak_mb", 220, 200),
    Target(LARGE_ROWS[256], "peak_mb", 240),
    *(Target(row, "later_share", 1.2) for row in LARGE_ROWS.values()),
    *(Target(row, f"x {API}", 0.8, 0.9, server=ALL, connections=16) for row in _ROWS),
    Target(POLLER, "cpu_ms", 0.35, 0.25, server=ALL),
    Target(POLLER, "cpu_percent", 30, server=ALL),
    Target(POLLER, "interval_ms", server=ALL),
    Target(READ_BESIDE, f"x {ALONE}", 0.6, 0.8, server=ALL, connections=16),
    Target(SUBMIT_BESIDE, f"x {ALONE}", 0.6, 0.8, server=ALL, connections=16),
    Target(CHECKS_BESIDE, "interval_ms", server=ALL),
    Target(READ, "p50_ms", 0.4, 0.3, connections=1),
    Target(SMALL_SUBMIT, "added_ms", 2.5, 1.8, connections=1),
    Target(LARGE_SUBMIT, "added_ms", 16, 10, connections=1),
    Target(LIST, "store_ms", 0.6),
    Target(FILTER, "store_ms", 2),
    Target(SCRAPE, "p50_ms", 60),
    Target(SCRAPED_READ, "p99_ms", 8, connections=16),
    Target(IDLE, "idle_mb", 75, 60),
    Target(IDLE, "cpu_percent", 1),
    Target(IDLE, "start_ms", 1_000),
    Target(STORE, "reserve_us", 90, server=ALL),
    Target(STORE, "settle_us", 100, server=ALL),
    Target(STORE, "record_check_us", 110, server=ALL),
    *(
        Target(row, figure, bound)
        for row in OVERLOADS
        for figure, bound in (
            (f"x {CAPACITY}", 0.8),
            ("max_ms", 10_000),
            ("recovery_ms", 2_000),
            *((f"{name}_p99_ms", 20) for name in PROBED),
            ("peak_mb", 240),
        )
    ),
    Target(SLOW_READ, f"x {ALONE}", 0.9, connections=16),
    Target(SLOW_SUBMIT, "p99_ms", connections=64),
)


def compare_targets(results: Sequence[Result]) -> list[list[str]]:
    """Return the table of the targets whose rows were measured."""
    rows = {item.row for item in results}
    lines = [["figure", "target", "before", "after", "reached", "after, by CPU"]]
    for target in TARGETS:
        if target.row in rows:
            after = target.find(results)
            sign = ">=" if target.figure.startswith("x ") else "<="
            text = "" if target.bound is None else f"{sign} {target.bound:,g}"
            text += "" if target.aim is None else f", aim {target.aim:,g}"
            reached = (
                "aim"
                if target.is_reached(after, target.aim)
                else "yes"
                if target.is_reached(after, target.bound)
                else "no"
            )
            values = [format_number(value) for value in (target.find(results, OTHER), after)]
            by_cpu = format_number(replace(target, figure=target.figure + BY_CPU).find(results))
            lines.append([target.text, text, *values, reached if target.bound is not None else "", by_cpu])
    return lines


def name_figure(name: str) -> str:
    """Return a figure's name for people."""
    return name.replace("_", " ")


def format_number(value: float) -> str:
    """Format with three digits; NaN is empty."""
    if math.isnan(value):
        return ""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
