"""The metrics writer produces the bytes of the client library."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, Summary
from prometheus_client.exposition import generate_latest

from service.telemetry.metrics import Metrics, format_exposition
from tests.unit.metric_samples import REGISTRY, SNAPSHOT

TEXTS = st.text(max_size=12) | st.sampled_from(["\\", '"', "\n", '\\"\n', "é漢", "a,b=c"])


@given(TEXTS, TEXTS, st.floats() | st.integers(-(2**60), 2**60).map(float))
def test_any_label_and_value(documentation: str, label: str, number: float) -> None:
    registry = CollectorRegistry()
    Gauge("gateway_a", documentation, ("one", "two"), registry=registry).labels(label, "x").set(number)
    assert format_exposition(registry) == generate_latest(registry)


def test_all_metric_types() -> None:
    registry = CollectorRegistry()
    Counter("gateway_c", "A counter.", ("kind",), registry=registry).labels("a").inc(2)
    Histogram("gateway_h_seconds", "A histogram.", ("kind",), buckets=(0.1, 1), registry=registry).labels("a").observe(
        0.3
    )
    Summary("gateway_s_seconds", "A summary.", registry=registry).observe(3)
    Info("gateway_i", "An info.", registry=registry).info({"version": "1"})
    Enum("gateway_e", "A state.", states=["on", "off"], registry=registry).state("on")
    assert format_exposition(registry) == generate_latest(registry)


def test_whole_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.label_names.read_registry = lambda: REGISTRY
    metrics.ledger_collector.set_snapshot(SNAPSHOT)
    metrics.label_names.refresh()
    families = list(metrics.registry.collect())
    monkeypatch.setattr(metrics.registry, "collect", lambda: iter(families))
    body = metrics.render()[0]
    assert body == generate_latest(metrics.registry)
    assert b"gateway_quota_used" in body
