"""Every series that Prometheus has of the gateway, and its labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from service.telemetry.metrics import Metrics
from tests.deploy.promql import Labels, result_labels, series_names

RULES = Path(__file__).parents[2] / "deploy" / "prometheus"

TARGET_LABELS: Labels = frozenset({"job", "instance", "namespace", "pod"})
"""What Prometheus adds to each series of a target; the last two where it finds its targets in Kubernetes."""

_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_sum", "_count"),
}


@cache
def ledger_series() -> frozenset[str]:
    """Names of the series that all processes read from the ledger alike, so that adding them up is wrong."""
    return frozenset(name for name, _ in _collector_series(Metrics(CollectorRegistry()).ledger_collector))


@cache
def exported_series() -> Mapping[str, Labels]:
    """Names of series and their labels: those of the gateway, of its process, of Prometheus, and of recording rules."""
    registry = Metrics(CollectorRegistry()).registry
    series = {"up": TARGET_LABELS}
    for collector in registry._collector_to_names:
        series.update(_collector_series(collector))
    documents = (each for file in sorted(RULES.glob("*.y*ml")) for each in yaml.safe_load_all(file.read_text("utf-8")))
    rules = [rule for document in documents for rule in _recording_rules(document)]
    while rules:
        # A rule may ask for what another one records, in whatever order they stand.
        records = {rule["record"] for rule in rules}
        ready = [rule for rule in rules if not series_names(rule["expr"]) & records]
        assert ready, f"recording rules that wait for each other: {records}"
        series |= {rule["record"]: result_labels(rule["expr"], series) | set(rule.get("labels", ())) for rule in ready}
        rules = [rule for rule in rules if rule not in ready]
    return series


def _collector_series(collector: Any) -> Iterator[tuple[str, Labels]]:
    """What one collector exports; the client keeps the names of the labels to itself until there are values."""
    describe = getattr(collector, "describe", collector.collect)
    for family in describe():
        labels = TARGET_LABELS | set(getattr(family, "_labelnames", getattr(collector, "_labelnames", ())))
        for suffix in _SUFFIXES.get(family.type, ("",)):
            yield family.name + suffix, labels | {"le"} if suffix == "_bucket" else labels


def _recording_rules(document: Any) -> Iterator[dict[str, Any]]:
    """The recording rules within a document, wherever in it they stand."""
    if isinstance(document, dict):
        if "record" in document:
            yield document
        document = document.values()
    if not isinstance(document, str) and isinstance(document, Iterable):
        for part in document:
            yield from _recording_rules(part)
