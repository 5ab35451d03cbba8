"""All shipped queries: of dashboard panels and variables, and of Prometheus rules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from promql_parser import BinaryExpr, VectorSelector, parse, walk

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = sorted((DEPLOY / "prometheus").glob("*.yaml"))
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))

RATE_INTERVAL = "10s"
"""Grafana's interval for scrapes as frequent as here, with some reserve for a busy machine."""

_OPERATORS = {"MatchOp.Equal": "=", "MatchOp.NotEqual": "!=", "MatchOp.Re": "=~", "MatchOp.NotRe": "!~"}
_POSITIVE_OPERATORS = {"=", "=~"}


class Query(NamedTuple):
    """A query and its location. An `instant` one shows the current value, others a range."""

    location: str
    text: str
    instant: bool = False


class VariableQuery(NamedTuple):
    """A dashboard variable: the values of a label of some series."""

    location: str
    series: str
    label: str


class Rule(NamedTuple):
    """A rule: its name, and the series that it records, None for an alert."""

    name: str
    text: str
    recorded_series: str | None


def panel_queries() -> list[Query]:
    """Return the queries of all panels, with every variable set to all."""
    return [
        Query(
            f"{dashboard['title']}: {panel['title']} ({number})",
            fill_variables(dashboard, target["expr"]),
            target["instant"],
        )
        for dashboard in _load_dashboards()
        for panel in dashboard["panels"]
        for number, target in enumerate(panel.get("targets", ()), 1)
    ]


def variable_queries() -> list[VariableQuery]:
    """Return the dashboard variables that are queried from series."""
    results = []
    for dashboard in _load_dashboards():
        for variable in dashboard["templating"]["list"]:
            if variable["type"] != "query":
                continue
            requested = re.fullmatch(
                r"label_values\((.+), (\w+)\)", fill_variables(dashboard, variable["query"]["query"])
            )
            if requested is None:
                raise AssertionError(variable)
            results.append(VariableQuery(f"{dashboard['title']}: {variable['name']}", requested[1], requested[2]))
    return results


def rules() -> list[Rule]:
    return [
        _parse_rule(rule)
        for file in RULES
        for group in yaml.safe_load(file.read_text("utf-8")).get("groups", ())
        for rule in group["rules"]
    ]


def all_query_texts() -> list[str]:
    """Return the text of every query of panels and rules."""
    return [panel_query.text for panel_query in panel_queries()] + [rule.text for rule in rules()]


def fill_variables(dashboard: Mapping[str, Any], query: str) -> str:
    """Fill in a query's variables as Grafana does for the choice `All`."""
    query = query.replace("$__rate_interval", RATE_INTERVAL)
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            query = query.replace(f"${variable['name']}", variable["allValue"])
    return query


def split_or(query: str) -> Iterator[str]:
    """Yield a query and each side of every `or`: a fallback would hide that the other side is missing."""
    yield query
    results: list[str] = []

    def enter(part: Any) -> None:
        if isinstance(part, BinaryExpr) and str(part.op) == "or":
            results.extend((str(part.lhs), str(part.rhs)))

    walk(parse(query), enter, lambda _: None)
    yield from results


def list_selectors(query: str) -> Iterator[str]:
    """Yield the selectors of a query, once for each label value that they name."""
    results: list[VectorSelector] = []

    def enter(part: Any) -> None:
        if isinstance(part, VectorSelector):
            results.append(part)

    walk(parse(query), enter, lambda _: None)
    for part in results:
        matchers = [(matcher.name, _OPERATORS[str(matcher.op)], matcher.value) for matcher in part.matchers.matchers]
        name = part.name or ""
        yield _format_selector(name, matchers)
        for place, (label, operator, value) in enumerate(matchers):
            for alternative in expand_alternatives(value) if operator in _POSITIVE_OPERATORS else ():
                yield _format_selector(
                    name, [*matchers[:place], (label, operator, alternative), *matchers[place + 1 :]]
                )


def expand_alternatives(pattern: str) -> list[str]:
    """Expand the alternatives of a regular expression, such as `(a|b)-.+` into `a-.+` and `b-.+`."""
    group = re.search(r"\(([^()]*)\)", pattern)
    if group is None:
        return pattern.split("|")
    before, after = pattern[: group.start()], pattern[group.end() :]
    return [
        alternative for choice in group[1].split("|") for alternative in expand_alternatives(before + choice + after)
    ]


def _parse_rule(rule: Mapping[str, Any]) -> Rule:
    if "alert" in rule:
        return Rule(rule["alert"], rule["expr"], None)
    labels: Mapping[str, str] = rule.get("labels", {})
    recorded = _format_selector(rule["record"], [(name, "=", value) for name, value in labels.items()])
    return Rule(recorded, rule["expr"], recorded)


def _format_selector(name: str, matchers: list[tuple[str, str, str]]) -> str:
    texts = (f"{label}{operator}{json.dumps(value)}" for label, operator, value in matchers)
    return f"{name}{{{', '.join(texts)}}}"


def _load_dashboards() -> list[Any]:
    return [json.loads(file.read_text("utf-8")) for file in DASHBOARDS]
