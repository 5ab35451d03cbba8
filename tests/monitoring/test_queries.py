"""Every query of a dashboard or rule returns data for a gateway with a full workload."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from promql_parser import BinaryExpr, parse, walk

from tests.deploy.queries import (
    DASHBOARDS,
    RULES,
    PanelQuery,
    Selector,
    fill_variables,
    list_selectors,
    panel_queries,
    query_variables,
)
from tests.monitoring.conftest import MonitoredSystem


def split_or(query: str) -> Iterator[str]:
    """Yield each side of every `or`: a fallback would hide that the other side is missing."""
    results: list[str] = []

    def enter(part: Any) -> None:
        if isinstance(part, BinaryExpr) and str(part.op) == "or":
            results.extend((str(part.lhs), str(part.rhs)))

    walk(parse(query), enter, lambda _: None)
    yield from results


def split_alternatives(selector: Selector) -> Iterator[Selector]:
    """Yield a selector once for each label value that it names."""
    matchers = selector.matchers
    if not any(operator in {"=", "=~"} for _, operator, _ in matchers):
        yield selector
    for place, (label, operator, value) in enumerate(matchers):
        for alternative in expand_alternatives(value) if operator in {"=", "=~"} else ():
            chosen = (label, operator, alternative)
            yield Selector(selector.name, (*matchers[:place], chosen, *matchers[place + 1 :]))


def expand_alternatives(pattern: str) -> list[str]:
    """Expand the alternatives of a regular expression, such as `(a|b)-.+` into `a-.+` and `b-.+`."""
    group = re.search(r"\(([^()]*)\)", pattern)
    if group is None:
        return pattern.split("|")
    before, after = pattern[: group.start()], pattern[group.end() :]
    return [part for choice in group[1].split("|") for part in expand_alternatives(before + choice + after)]


@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: query.location)
def test_panel(monitored: MonitoredSystem, query: PanelQuery) -> None:
    """A panel shows data, and so does each side of its fallbacks; its legend has all labels that distinguish lines."""
    get = monitored.prometheus.query_history  # also for the current value: the last scrape may have failed
    for part in (query.text, *split_or(query.text)):
        assert get(part), part
    root: Any = parse(query.text)
    has_fallback = isinstance(root, BinaryExpr) and str(root.op) == "or"
    series = get(str(root.lhs) if has_fallback else query.text)
    labels = {label for item in series for label in item["metric"]} - {"__name__"}
    labels -= {"job", "namespace", "pod"}  # which Prometheus adds to all, the last two only in Kubernetes
    if query.legend is not None:
        assert set(re.findall(r"{{(\w+)}}", query.legend)) == labels


def test_selectors(monitored: MonitoredSystem) -> None:
    """Each selected and each recorded series exists, with every label value that is named."""
    queries = [*(query.text for query in panel_queries()), *(rule["expr"] for rule in RULES)]
    selectors = {
        str(alternative)
        for query in queries
        for selector in list_selectors(query)
        for alternative in split_alternatives(selector)
    }
    for rule in RULES:
        if "record" in rule:
            matchers = tuple((label, "=", value) for label, value in rule.get("labels", {}).items())
            selectors.add(str(Selector(rule["record"], matchers)))
    assert [selector for selector in sorted(selectors) if not monitored.prometheus.list_series(selector)] == []


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
def test_variables(monitored: MonitoredSystem, dashboard: Mapping[str, Any]) -> None:
    """A dashboard variable has values."""
    for variable in query_variables(dashboard):
        query = re.fullmatch(r"label_values\((.+), (\w+)\)", fill_variables(dashboard, variable["query"]["query"]))
        assert query
        assert query[2] in {name for item in monitored.prometheus.list_series(query[1]) for name in item}


def test_rules_are_evaluated(monitored: MonitoredSystem) -> None:
    """No rule has failed on the metrics of two replicas, and none is missing."""
    rules = [rule for group in monitored.prometheus.rule_groups() for rule in group["rules"]]
    assert {item["name"]: item["lastError"] for item in rules if item["health"] != "ok"} == {}
    assert len(rules) == len(RULES)
