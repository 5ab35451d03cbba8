"""The shipped rules and dashboards, their queries, and the series that they may use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from prometheus_client import CollectorRegistry
from promql_parser import AggregateExpr, BinaryExpr, Call, VectorSelector, parse, walk

from service.telemetry.metrics import Metrics

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
RATE_INTERVAL = "10s"
"""Grafana's interval for scrapes once a second, with some reserve for a busy machine."""
TARGET_LABELS = frozenset({"job", "instance", "namespace", "pod"})
"""Labels that Prometheus adds to each series; the last two only in Kubernetes."""

_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
_OPERATORS = {"MatchOp.Equal": "=", "MatchOp.NotEqual": "!=", "MatchOp.Re": "=~", "MatchOp.NotRe": "!~"}


class Matcher(NamedTuple):
    """A condition on a label."""

    label: str
    operator: str
    value: str


class Selector(NamedTuple):
    """A selector of series within a query."""

    name: str
    matchers: tuple[Matcher, ...]
    enclosing: tuple[str, ...] = ()
    """The functions and aggregations around it, from the inside out."""

    def __str__(self) -> str:
        return f"{self.name}{{{', '.join(f'{label}{how}{json.dumps(value)}' for label, how, value in self.matchers)}}}"


class PanelQuery(NamedTuple):
    """A query of a panel with every variable set to all. An `instant` one shows the current value, others a range."""

    location: str
    text: str
    legend: str
    instant: bool


def panels(dashboard: Mapping[str, Any]) -> Sequence[Any]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def panel_queries() -> Sequence[PanelQuery]:
    return [
        PanelQuery(
            f"{name}: {panel['title']} ({number})",
            fill_variables(dashboard, target["expr"]),
            target["legendFormat"],
            target["instant"],
        )
        for name, dashboard in DASHBOARDS.items()
        for panel in panels(dashboard)
        for number, target in enumerate(panel["targets"], 1)
    ]


def query_variables(dashboard: Mapping[str, Any]) -> Sequence[Any]:
    """Return the variables with the values of a label."""
    return [variable for variable in dashboard["templating"]["list"] if variable["type"] == "query"]


def fill_variables(dashboard: Mapping[str, Any], query: str) -> str:
    """Fill in a query's variables as Grafana does for the choice `All`."""
    query = query.replace("$__rate_interval", RATE_INTERVAL)
    for variable in query_variables(dashboard):
        query = query.replace(f"${variable['name']}", variable["allValue"])
    return query


def parse_label_values(query: str) -> tuple[str, str]:
    """Return series and label of `label_values(SERIES, LABEL)`."""
    match = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
    assert match, query
    return match[1], match[2]


@cache
def list_selectors(query: str) -> Sequence[Selector]:
    """Return the selectors of a query from left to right. Raises ValueError if it does not parse."""
    results: list[Selector] = []
    around: list[str] = []

    def enter(part: Any) -> None:
        if isinstance(part, VectorSelector):
            matchers = [Matcher(item.name, _OPERATORS[str(item.op)], item.value) for item in part.matchers.matchers]
            results.append(Selector(part.name, tuple(matchers), tuple(reversed(around))))
        elif isinstance(part, AggregateExpr):
            around.append(str(part.op))
        elif isinstance(part, Call):
            around.append(part.func.name)

    def leave(part: Any) -> None:
        if isinstance(part, AggregateExpr | Call):
            around.pop()

    walk(parse(query), enter, leave)
    return results


def named_labels(query: str) -> frozenset[str]:
    """Return the labels by which a query groups and matches, without those that it creates."""
    results: set[str] = set()
    created: set[str] = set()

    def enter(part: Any) -> None:
        if isinstance(part, AggregateExpr) and part.modifier:
            results.update(part.modifier.labels)
        elif isinstance(part, BinaryExpr) and part.modifier:
            matching = part.modifier.matching
            results.update(matching.labels if matching else (), part.modifier.group_labels or ())
        elif isinstance(part, Call) and part.func.name == "label_replace":
            created.add(part.args[1].val)

    walk(parse(query), enter, lambda _: None)
    return frozenset(results - created)


def find_unknown_names(query: str) -> set[str]:
    """Return the series and labels in a query that do not exist: to Prometheus they are no error, but have no data."""
    known = exported_series()
    selectors = list_selectors(query)
    labels = frozenset[str]().union(*(known.get(item.name, ()) for item in selectors))
    unknown = {item.name for item in selectors} - known.keys()
    for item in selectors:
        unknown |= {matcher.label for matcher in item.matchers} - known.get(item.name, frozenset())
    return unknown | (named_labels(query) - labels)


@cache
def exported_series() -> Mapping[str, frozenset[str]]:
    """Return all series with their labels: of the gateway, of Prometheus, and of the recording rules.

    A recorded series has at most the labels of the series that its rule uses.
    """
    series = {"up": TARGET_LABELS}
    for collector in Metrics(CollectorRegistry()).registry._collector_to_names:
        series.update(_collector_series(collector))
    for rule in RULES:
        if "record" in rule:
            own = (series.get(item.name, frozenset()) for item in list_selectors(rule["expr"]))
            before = series.get(rule["record"], frozenset())
            series[rule["record"]] = before.union(rule.get("labels", ()), *own)
    return series


@cache
def ledger_series() -> frozenset[str]:
    """Return the names of series that all processes read from the ledger, so that summing them is wrong."""
    return frozenset(name for name, _ in _collector_series(Metrics(CollectorRegistry()).ledger_collector))


def _collector_series(collector: Any) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield the series of a collector. The client library shows label names only once there are values."""
    describe = getattr(collector, "describe", collector.collect)
    for family in describe():
        labels = TARGET_LABELS | set(getattr(family, "_labelnames", getattr(collector, "_labelnames", ())))
        for suffix in _SUFFIXES.get(family.type, ("",)):
            yield family.name + suffix, labels | {"le"} if suffix == "_bucket" else labels
