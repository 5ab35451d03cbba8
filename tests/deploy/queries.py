"""The shipped rules and dashboards with their queries, and the metrics of the gateway."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from promql_parser import AggregateExpr, Call, VectorSelector, parse, walk

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
RULE_FILES: Sequence[Path] = sorted({*PROMETHEUS.glob("alerts-*.yaml"), PROMETHEUS / "recording.yaml"})
DASHBOARDS: Mapping[str, Any] = {
    file.stem: json.loads(file.read_text("utf-8"))
    for file in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
}
RULES: Sequence[Mapping[str, Any]] = [
    rule
    for file in RULE_FILES
    for group in yaml.safe_load(file.read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
"""Several may share a name and differ in labels."""
_OPERATORS = {"MatchOp.Equal": "=", "MatchOp.NotEqual": "!=", "MatchOp.Re": "=~", "MatchOp.NotRe": "!~"}


class Selector(NamedTuple):
    """A selector of series within a query."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]
    """Labels, operators and values."""
    enclosing: tuple[str, ...] = ()
    """The functions and aggregations around it, from the inside out."""

    def __str__(self) -> str:
        return f"{self.name}{{{', '.join(f'{label}{how}{json.dumps(value)}' for label, how, value in self.matchers)}}}"


class PanelQuery(NamedTuple):
    """A query of a panel or an annotation with every variable set to all. A table has no legend."""

    location: str
    text: str
    legend: str | None


def panel_queries() -> Sequence[PanelQuery]:
    queries = [
        PanelQuery(
            f"{name}: {panel['title']} ({number})",
            fill_variables(dashboard, target["expr"]),
            target.get("legendFormat"),
        )
        for name, dashboard in DASHBOARDS.items()
        for panel in dashboard["panels"]
        if panel["type"] != "row"
        for number, target in enumerate(panel["targets"], 1)
    ]
    queries += [
        PanelQuery(
            f"{name}: annotation {item['name']}",
            fill_variables(dashboard, item["target"]["expr"]),
            item["titleFormat"] + item["textFormat"],
        )
        for name, dashboard in DASHBOARDS.items()
        for item in dashboard["annotations"]["list"]
    ]
    return queries


def query_variables(dashboard: Mapping[str, Any]) -> Sequence[Any]:
    """Return the variables with the values of a label."""
    return [variable for variable in dashboard["templating"]["list"] if variable["type"] == "query"]


def fill_variables(dashboard: Mapping[str, Any], query: str) -> str:
    """Fill in a query's variables as Grafana does for the choice `All`."""
    # Its interval for scrapes once a second, with some reserve for a busy machine.
    query = query.replace("$__rate_interval", "10s")
    for variable in query_variables(dashboard):
        query = query.replace(f"${variable['name']}", variable["allValue"])
    return query


@cache
def list_selectors(query: str) -> Sequence[Selector]:
    """Return the selectors of a query from left to right. Raises ValueError if it does not parse."""
    results: list[Selector] = []
    around: list[str] = []

    def enter(part: Any) -> None:
        if isinstance(part, VectorSelector):
            matchers = [(item.name, _OPERATORS[str(item.op)], item.value) for item in part.matchers.matchers]
            results.append(Selector(part.name or "", tuple(matchers), tuple(reversed(around))))
        elif isinstance(part, AggregateExpr):
            around.append(str(part.op))
        elif isinstance(part, Call):
            around.append(part.func.name)

    def leave(part: Any) -> None:
        if isinstance(part, AggregateExpr | Call):
            around.pop()

    walk(parse(query), enter, leave)
    return results
