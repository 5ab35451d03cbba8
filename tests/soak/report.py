"""The results of a run as a table, a page and a plot."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tests.bench.load import percentile
from tests.soak.run import WARM_UP_SHARE, Result
from tests.soak.verdict import CONFIDENCE

_PAGE = """# Soak results

Written by `make soak` on {date}: {seconds:.0f} s of mixed traffic on {cores} cores, {requests:,} requests and
{tasks:,} tasks. The rises are those after the warm-up of {warm_up:.0f} s, by Theil and Sen, with bounds of
{confidence:.0%} confidence. A figure fails if it is above its limit with that confidence.

{table}
{faults}
![Memory, descriptors, latency and keys of this run](results.png)
"""


def format_table(result: Result) -> str:
    """Return the verdicts as a Markdown table."""
    rows = [("figure", "rise", "bounds", "limit", "unit", "verdict"), ("---", *["---:"] * 3, "---", "---")]
    for verdict in result.verdicts:
        slope = verdict.slope
        bounds = f"{slope.low:.2f} to {slope.high:.2f}"
        rows.append(
            (verdict.name, f"{slope.estimate:.2f}", bounds, f"{verdict.limit:g}", verdict.unit, verdict.outcome)
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def format_page(result: Result) -> str:
    return _PAGE.format(
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        seconds=result.seconds,
        cores=os.cpu_count(),
        requests=result.requests,
        tasks=result.samples[-1].tasks,
        warm_up=result.seconds * WARM_UP_SHARE,
        confidence=CONFIDENCE,
        table=format_table(result),
        faults="".join(f"- {fault}\n" for fault in result.faults),
    )


def draw(result: Result, path: Path) -> None:
    """Draw the samples into a PNG; the warm-up is shaded."""
    samples, counts = result.samples, result.key_counts
    minutes = [sample.at / 60 for sample in samples]
    names = [*samples[0].memory_mb]
    lines: list[tuple[str, Mapping[str, Sequence[tuple[float, float]]]]] = [
        ("memory less that after the warm-up, MB", {name: _memory_changes(result, name) for name in names}),
        ("descriptors", {name: _zip(minutes, [sample.descriptors[name] for sample in samples]) for name in names}),
        (
            "latency, ms",
            {
                f"{action}, {percent:g} of 100": [
                    (sample.at / 60, percentile(sample.latency_ms[action], percent))
                    for sample in samples
                    if action in sample.latency_ms
                ]
                for action in ("submit", "read", "list")
                for percent in (50, 99)
            },
        ),
        (
            "keys",
            {
                "with a time to live": [(count.at / 60, sum(count.with_ttl.values())) for count in counts],
                "without": [(count.at / 60, sum(count.without_ttl.values())) for count in counts],
            },
        ),
        ("members of sorted sets", _by_pattern([(count.at / 60, count.sorted_sets) for count in counts])),
        (
            "the store's data, MB, and tasks in thousands",
            {
                "data": _zip(minutes, [sample.store_mb for sample in samples]),
                "tasks": _zip(minutes, [sample.tasks / 1000 for sample in samples]),
            },
        ),
    ]
    figure = Figure(figsize=(15, 8), layout="constrained", dpi=80)
    for axis, (heading, series) in zip(figure.subplots(2, 3).flat, lines, strict=True):
        _draw_lines(axis, heading, series, warm_up=result.seconds * WARM_UP_SHARE / 60)
    figure.suptitle(f"make soak: {result.requests:,} requests in {result.seconds / 60:.0f} minutes")
    figure.savefig(path, metadata={"Software": None})


def _draw_lines(
    axis: Any, heading: str, series: Mapping[str, Sequence[tuple[float, float]]], *, warm_up: float
) -> None:
    for name, points in series.items():
        if points:
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axis.axvspan(0, warm_up, color="0.93")
    axis.set(title=heading, xlabel="minutes")
    if "latency" in heading:
        axis.set_yscale("log")
    elif "memory" not in heading:
        axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


def _memory_changes(result: Result, name: str) -> list[tuple[float, float]]:
    warm = next(sample for sample in result.samples if sample.at >= result.seconds * WARM_UP_SHARE)
    return [(sample.at / 60, sample.memory_mb[name] - warm.memory_mb[name]) for sample in result.samples]


def _zip(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(xs, ys, strict=True))


def _by_pattern(counts: Sequence[tuple[float, Mapping[str, int]]]) -> Mapping[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for at, members in counts:
        for name, count in members.items():
            series[name].append((at, count))
    return series
