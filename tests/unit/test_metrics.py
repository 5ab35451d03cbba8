"""What the gateway counts."""

from __future__ import annotations

from enum import StrEnum

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from service.domain.task import Basis, Cost, Kind, State
from service.telemetry.metrics import Metrics, Port


class Outcome(StrEnum):
    """An outcome that some caller knows of."""

    GOOD = "good"


@pytest.fixture
def metrics() -> Metrics:
    """The metrics of a process that has just started."""
    return Metrics(CollectorRegistry(), version="1.2.3")


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """A sample as a scrape shows it."""
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return None


def test_requests_are_counted_and_timed(metrics: Metrics) -> None:
    """A request counts under its method, route and status, and its duration under its route."""
    for seconds in (0.2, 0.4):
        metrics.request(Port.TENANTS, "GET", "/v1/tasks/{task_id}", 200, seconds)
    metrics.request(Port.OPERATORS, "GET", "/v1/tasks/{task_id}", 200, 1)
    labels = {"port": "tenants", "method": "GET", "route": "/v1/tasks/{task_id}"}
    assert value(metrics, "gateway_http_requests_total", **labels, status="200") == 2
    assert value(metrics, "gateway_http_request_duration_seconds_sum", **labels) == pytest.approx(0.6)
    assert value(metrics, "gateway_http_request_duration_seconds_bucket", **labels, le="0.25") == 1


def test_unknown_methods_share_one_label(metrics: Metrics) -> None:
    """A client can't make new time series by making up methods."""
    for method in ("BREW", "get", "PROPFIND"):
        metrics.request(Port.TENANTS, method, "/", 405, 0.1)
    assert value(metrics, "gateway_http_requests_total", method="other") == 3


def test_requests_under_way_are_counted_until_they_end(metrics: Metrics) -> None:
    """A request is in progress within the block, however it ends."""

    def crash() -> None:
        with metrics.in_progress(Port.TENANTS):
            assert value(metrics, "gateway_http_requests_in_progress", port="tenants") == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    assert value(metrics, "gateway_http_requests_in_progress", port="tenants") == 0


def test_each_event_has_its_counter(metrics: Metrics) -> None:
    """What callers report is found under the labels they gave."""
    metrics.upstream(Outcome.GOOD, Outcome.GOOD, 3)
    metrics.submission(Kind.UPSCALE, Outcome.GOOD)
    metrics.finished(Kind.SEAMLESS, State.FAILED, Cost(1, 250, Basis.ESTIMATED))
    metrics.replayed()
    metrics.checked(Outcome.GOOD)
    assert value(metrics, "gateway_upstream_requests_total", operation="good", outcome="good") == 1
    assert value(metrics, "gateway_upstream_request_duration_seconds_sum", operation="good", outcome="good") == 3
    assert value(metrics, "gateway_submissions_total", kind="upscale", outcome="good") == 1
    assert value(metrics, "gateway_tasks_finished_total", kind="seamless", state="failed") == 1
    spent = {"kind": "seamless", "basis": "estimated"}
    assert value(metrics, "gateway_spent_count_total", **spent) == 1
    assert value(metrics, "gateway_spent_yuan_total", **spent) == 2.5
    assert value(metrics, "gateway_idempotent_replays_total") == 1
    assert value(metrics, "gateway_watch_checks_total", answer="good") == 1


def test_denials_are_counted_by_policy(metrics: Metrics) -> None:
    """Each policy has its counter from the start, and what is no policy shares one."""
    metrics.denied("day-tasks")
    metrics.denied("max-active")
    metrics.denied("made-up")
    metrics.denied("made-up-too")
    counts = {name: value(metrics, "gateway_quota_denials_total", policy=name) for name in ("day-tasks", "max-active")}
    assert counts == {"day-tasks": 1, "max-active": 1}
    assert value(metrics, "gateway_quota_denials_total", policy="total-money") == 0
    assert value(metrics, "gateway_quota_denials_total", policy="other") == 2
    assert value(metrics, "gateway_quota_denials_total", policy="made-up") is None


def test_the_build_is_told(metrics: Metrics) -> None:
    """The version that runs is a label of a constant."""
    assert value(metrics, "gateway_build_info", version="1.2.3") == 1


def test_others_can_add_to_the_registry(metrics: Metrics) -> None:
    """What is put on the registry elsewhere is rendered with the rest."""
    Gauge("gateway_elsewhere", "Something else.", registry=metrics.registry).set(7)
    assert value(metrics, "gateway_elsewhere") == 7
