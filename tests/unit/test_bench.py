"""Reports of the benchmark."""

from __future__ import annotations

import json
import math
from collections import Counter

from tests.bench.candidates import API, FASTAPI, LUA
from tests.bench.closed_loops import DIRECT, SMALL_SUBMIT
from tests.bench.comparison import OTHER, Comparison, Result
from tests.bench.load import Answers, percentile
from tests.bench.report import add_ratios, format_json, format_tables


def make_result(server: str, per_second: float, p50_ms: float, connections: int = 1, **errors: int) -> Result:
    return Result(SMALL_SUBMIT, server, connections, {"per_second": per_second, "p50_ms": p50_ms}, errors)


def test_ratios_are_taken_within_a_row_and_connection_count() -> None:
    own, *_ = add_ratios(
        [
            make_result(API, 100, 8),
            make_result(LUA, 1_000, 0.6),
            make_result(FASTAPI, 200, 5),
            make_result(FASTAPI, 999, 5, connections=16),
            make_result(f"{API} ({OTHER})", 50, 16),
            make_result(DIRECT, 5_000, 0.5),
        ]
    )
    assert own.figures["added_ms"] == 7.5
    assert own.figures[f"x {LUA}"] == 0.1
    assert own.figures[f"x {FASTAPI}"] == 0.5
    assert own.figures[f"per_second x {OTHER}"] == 2
    several, _ = add_ratios([make_result(API, 100, 80, connections=16), make_result(DIRECT, 5_000, 0.5)])
    assert "added_ms" not in several.figures


def test_result_is_the_median_with_all_errors() -> None:
    comparison = Comparison()
    for per_second, errors in ((10, 0), (30, 2), (20, 3)):
        comparison.add("row", API, {"per_second": per_second}, Counter({"503": errors}))
    (result,) = comparison.results()
    assert (result.figures, result.errors) == ({"per_second": 20}, {"503": 5})
    table = format_tables([make_result(API, 100, 8, **{"503": 7}), make_result(LUA, 1_000, 1)], {})
    assert any("7 503" in line for line in table.splitlines() if line.startswith("| api"))
    listed = json.loads(format_json({}, [make_result(API, 0, math.nan)]))["results"]
    assert listed[0]["figures"] == {"per_second": 0, "p50_ms": None}


def test_only_successful_responses_count() -> None:
    answers = Answers()
    for status, seconds in (("201", 0.3), ("503", 0.1), ("timeout", 30), ("201", 0.2)):
        answers.add(status, seconds)
    assert answers.succeeded() == [0.2, 0.3]
    assert answers.errors() == {"503": 1, "timeout": 1}
    assert percentile(range(1, 101), 99) == 100
    assert percentile([3, 1, 2], 50) == 2
    assert math.isnan(percentile([], 50))
