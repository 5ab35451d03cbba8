"""Whatever is asked by a dashboard or a rule is answered by a gateway that has something to tell."""

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
"""Queries that may have no answer though all is well, and why."""


@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: query.place)
def test_panel(seen: MonitoredSystem, query: Query) -> None:
    """A panel shows something, and so does each part of it that another one stands in for."""
    for part in split_or(query.text):
        answer = seen.prometheus.query_final(part) if query.instant else seen.prometheus.query_history(part)
        assert answer or part in EMPTY_QUERIES, part


@pytest.mark.parametrize("query", sorted(set(all_query_texts())), ids=lambda text: text[:100])
def test_names(seen: MonitoredSystem, query: str) -> None:
    """Each series that is asked for is there, with every value of a label that is named."""
    for each in list_selectors(query):
        assert seen.prometheus.query_history(f"count({each})") or each in EMPTY_QUERIES, each


@pytest.mark.parametrize("choice", variable_queries(), ids=lambda choice: choice.place)
def test_choice(seen: MonitoredSystem, choice: VariableQuery) -> None:
    """A variable of a dashboard gives something to choose from."""
    assert seen.prometheus.label_values(choice.label, choice.series)


@pytest.mark.parametrize("rule", [each for each in rules() if each.recorded_series], ids=lambda rule: rule.name)
def test_record(seen: MonitoredSystem, rule: Rule) -> None:
    """What a rule records is there."""
    assert seen.prometheus.query_history(str(rule.recorded_series))


def test_rules_are_evaluated(seen: MonitoredSystem) -> None:
    """No rule has failed on what two replicas tell, and none is missing."""
    found = seen.prometheus.rules()
    assert {each["name"]: each["lastError"] for each in found if each["health"] != "ok"} == {}
    assert len(found) == len(rules())


def test_silent_ones_are_asked() -> None:
    """No excuse is kept for what nobody asks."""
    asked = {part for query in panel_queries() for part in split_or(query.text)}
    asked |= {each for text in all_query_texts() for each in list_selectors(text)}
    assert EMPTY_QUERIES.keys() <= asked
