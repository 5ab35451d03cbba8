"""All series of the gateway in Prometheus, with their labels."""

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
"""Labels that Prometheus adds to each series; the last two only in Kubernetes."""

_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_sum", "_count"),
}


@cache
def ledger_series() -> frozenset[str]:
    """Return the names of series that all processes read from the ledger, so that summing them is wrong."""
    return frozenset(name for name, _ in _collector_series(Metrics(CollectorRegistry()).ledger_collector))


@cache
def exported_series() -> Mapping[str, Labels]:
    """Return all series with their labels: of the gateway, the process, Prometheus and the recording rules."""
    registry = Metrics(CollectorRegistry()).registry
    series = {"up": TARGET_LABELS}
    for collector in registry._collector_to_names:
        series.update(_collector_series(collector))
    documents = (item for file in sorted(RULES.glob("*.y*ml")) for item in yaml.safe_load_all(file.read_text("utf-8")))
    rules = [rule for document in documents for rule in _recording_rules(document)]
    while rules:
        # A rule may depend on another one, in any order.
        records = {rule["record"] for rule in rules}
        ready = [rule for rule in rules if not series_names(rule["expr"]) & records]
        assert ready, f"circular recording rules: {records}"
        series |= {rule["record"]: result_labels(rule["expr"], series) | set(rule.get("labels", ())) for rule in ready}
        rules = [rule for rule in rules if rule not in ready]
    return series


def _collector_series(collector: Any) -> Iterator[tuple[str, Labels]]:
    """Yield the series of a collector. The client library shows label names only once there are values."""
    describe = getattr(collector, "describe", collector.collect)
    for family in describe():
        labels = TARGET_LABELS | set(getattr(family, "_labelnames", getattr(collector, "_labelnames", ())))
        for suffix in _SUFFIXES.get(family.type, ("",)):
            yield family.name + suffix, labels | {"le"} if suffix == "_bucket" else labels


def _recording_rules(document: Any) -> Iterator[dict[str, Any]]:
    """Yield the recording rules anywhere within a document."""
    if isinstance(document, dict):
        if "record" in document:
            yield document
        document = document.values()
    if not isinstance(document, str) and isinstance(document, Iterable):
        for part in document:
            yield from _recording_rules(part)
