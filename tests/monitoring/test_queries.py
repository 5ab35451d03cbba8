"""Every query of a dashboard or rule returns data for a gateway with a full workload."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.monitoring.conftest import MonitoredSystem
from tests.monitoring.queries import (
    Query,
    Rule,
    VariableQuery,
    all_query_texts,
    list_selectors,
    panel_queries,
    rules,
    split_or,
    variable_queries,
)

EMPTY_QUERIES: Mapping[str, str] = {}
"""Queries that may be empty, and the reason."""


@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: query.location)
def test_panel(monitored: MonitoredSystem, query: Query) -> None:
    """A panel shows data, and so does each side of its fallbacks."""
    for part in split_or(query.text):
        answer = monitored.prometheus.query_final(part) if query.instant else monitored.prometheus.query_history(part)
        assert answer or part in EMPTY_QUERIES, part


@pytest.mark.parametrize("query", sorted(set(all_query_texts())), ids=lambda text: text[:100])
def test_selectors(monitored: MonitoredSystem, query: str) -> None:
    """Each selected series exists, with every label value that is named."""
    for selector in list_selectors(query):
        assert monitored.prometheus.query_history(f"count({selector})") or selector in EMPTY_QUERIES, selector


@pytest.mark.parametrize("choice", variable_queries(), ids=lambda choice: choice.location)
def test_variable(monitored: MonitoredSystem, choice: VariableQuery) -> None:
    """A dashboard variable has values."""
    assert monitored.prometheus.label_values(choice.label, choice.series)


@pytest.mark.parametrize("rule", [item for item in rules() if item.recorded_series], ids=lambda rule: rule.name)
def test_record(monitored: MonitoredSystem, rule: Rule) -> None:
    assert monitored.prometheus.query_history(str(rule.recorded_series))


def test_rules_are_evaluated(monitored: MonitoredSystem) -> None:
    """No rule has failed on the metrics of two replicas, and none is missing."""
    result = monitored.prometheus.rules()
    assert {item["name"]: item["lastError"] for item in result if item["health"] != "ok"} == {}
    assert len(result) == len(rules())


def test_empty_queries_exist() -> None:
    """Every entry of EMPTY_QUERIES is still in use."""
    requested = {part for query in panel_queries() for part in split_or(query.text)}
    requested |= {selector for text in all_query_texts() for selector in list_selectors(text)}
    assert EMPTY_QUERIES.keys() <= requested
