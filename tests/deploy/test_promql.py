"""The static checks of PromQL."""

from __future__ import annotations

import pytest

from tests.deploy.promql import SeriesUse, find_errors, result_labels, series_uses

EXPORTED = {
    "seconds_bucket": frozenset({"job", "route", "le"}),
    "requests_total": frozenset({"job", "route"}),
    "info": frozenset({"job", "version"}),
}


@pytest.mark.parametrize(
    "query",
    [
        "sum by (route) (rate(requests_total[5m]))",
        "histogram_quantile(0.9, sum by (route, le) (rate(seconds_bucket[5m])))",
        "sum by (route) (requests_total) / on () group_left () sum(requests_total)",
        "sum by (version) (requests_total * on (job) group_left (version) info)",
        'sum by (a) (label_replace(info, "a", "b", "", ""))',
        "sum(requests_total) or vector(0)",
        "sum without (route) (requests_total) + ignoring (version) info",
        "time() - 1 > max(info)",
    ],
)
def test_valid_query(query: str) -> None:
    assert find_errors(query, EXPORTED) == []


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("sum(rate(requests_total[5m])", "parse"),
        ("rate(request_total[5m])", "request_total is not exported"),
        ('requests_total{path="/"}', "{path}"),
        ("sum by (path) (requests_total)", "{path}"),
        ("sum by (route) (sum by (job) (requests_total))", "{route}"),
        ("sum without (path) (requests_total)", "{path}"),
        ("histogram_quantile(0.9, sum by (route) (rate(seconds_bucket[5m])))", "{le}"),
        ("requests_total / sum by (route) (requests_total)", "never matches {job, route} with {route}"),
        ("requests_total and on (version) info", "{version}"),
        ("requests_total * on (job) group_left (path) info", "{path}"),
        ("topk by (path) (3, requests_total)", "{path}"),
    ],
)
def test_invalid_query(query: str, wrong: str) -> None:
    """An unknown series or label is reported by name."""
    result = find_errors(query, EXPORTED)
    assert len(result) == 1
    assert wrong in result[0]


def test_result_labels() -> None:
    """The labels after grouping and matching are known."""
    assert result_labels("sum by (route) (requests_total) > 1", EXPORTED) == {"route"}
    assert result_labels("requests_total * on (job) group_left (version) info", EXPORTED) == {"job", "route", "version"}
    assert result_labels("requests_total * on (job) info", EXPORTED) == {"job"}
    assert result_labels("topk(3, requests_total)", EXPORTED) == {"job", "route"}
    assert result_labels("vector(1)", EXPORTED) == set()


def test_enclosing_functions() -> None:
    """Each selector is returned with its matchers and its enclosing functions, innermost first."""
    assert series_uses('sum(max by (job) (rate(requests_total{route="/"}[5m]))) / info') == [
        SeriesUse("requests_total", frozenset({"route"}), ("rate", "max", "sum")),
        SeriesUse("info", frozenset(), ()),
    ]
