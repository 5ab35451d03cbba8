"""Metrics of the gateway, and their text format."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.domain.ledger import AccountState, BalanceReading, ReadingSource
from service.domain.tasks import Kind
from service.domain.tenants import Account, AccountPolicy, Limit, Registry, Tenant, TenantPolicy, Window
from service.telemetry.gauges import AccountSample, MetricsSnapshot, QuotaSample
from service.telemetry.metrics import Metrics, Port, RedisOutcome, format_exposition, preregister

_LIMITS = (Limit(Window.DAY, tasks=9), Limit(Window.MONTH, money_fen=900))
REGISTRY = Registry(
    version=1,
    tenants={
        "shop": Tenant(1, "shop", ("main",), TenantPolicy(_LIMITS, max_active=3), kinds=(Kind.UPSCALE, Kind.SEAMLESS))
    },
    accounts={"main": Account(2, "main", b"encrypted")},
)


def read_sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            if sample.name == f"gateway_{name}" and labels.items() <= sample.labels.items():
                return float(sample.value)
    return None


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def test_requests_are_counted_and_timed(metrics: Metrics) -> None:
    route = "/v1/tasks/{task_id}"
    for seconds in (0.2, 0.4):
        metrics.record_request(Port.TENANTS, "GET", route, 200, seconds)
    metrics.record_request(Port.TENANTS, "GET", route, 200, 90, is_stream=True)
    metrics.record_request(Port.OPERATORS, "GET", route, 200, 1)
    labels = {"port": "tenants", "method": "GET", "route": route}
    assert read_sample(metrics, "http_requests_total", **labels, status="200") == 3
    assert read_sample(metrics, "http_request_duration_seconds_sum", **labels) == pytest.approx(0.6)
    assert read_sample(metrics, "http_request_duration_seconds_bucket", **labels, le="0.25") == 1
    assert read_sample(metrics, "http_stream_duration_seconds_sum", **labels) == 90
    # Label values of clients would be without bound.
    metrics.record_request(Port.TENANTS, "BREW", "/", 405, 0.1)
    assert read_sample(metrics, "http_requests_total", method="other") == 1


def test_known_series_start_at_zero(metrics: Metrics) -> None:
    # Otherwise `increase()` misses the first event.
    metrics.label_names.read_registry = lambda: REGISTRY
    preregister(metrics.redis_calls, ["reserve"], RedisOutcome)
    metrics.label_names.refresh()
    assert read_sample(metrics, "redis_calls_total", command="reserve", outcome="unavailable") == 0
    assert read_sample(metrics, "redis_errors_total", error="connection") == 0
    assert read_sample(metrics, "webhook_attempts_total", state="failed") == 0
    assert read_sample(metrics, "account_spent_yuan_total", account="main") == 0
    for policy in ("day-tasks", "month-money", "max-active"):
        assert read_sample(metrics, "quota_denials_total", tenant="shop", policy=policy) == 0
    assert read_sample(metrics, "balance_denials_total", tenant="shop") == 0
    assert read_sample(metrics, "quota_denials_total", policy="day-money") is None
    for name in ("tasks_submitted", "tasks_finished", "spent_yuan"):
        assert read_sample(metrics, f"{name}_total", tenant="shop", kind="upscale") == 0
        assert read_sample(metrics, f"{name}_total", tenant="shop", kind="vectorize") is None


def test_tenants_beyond_the_cap_share_a_label_and_deleted_ones_lose_it() -> None:
    metrics = Metrics(CollectorRegistry(), max_named_tenants=2)

    def count_tasks(ids: dict[str, int], *tenants: int) -> list[float | None]:
        registry = Registry(tenants={name: Tenant(number, name, ()) for name, number in ids.items()})
        metrics.label_names.read_registry = lambda: registry
        for tenant in tenants:
            metrics.tasks_submitted.labels(metrics.label_names.of_tenant(tenant), Kind.UPSCALE).inc()
        names = ("first", "second", "third", "other")
        return [read_sample(metrics, "tasks_submitted_total", tenant=name, kind="upscale") for name in names]

    assert count_tasks({"third": 9, "first": 3, "second": 5}, 3, 5, 9, 77) == [1, 1, None, 2]
    assert count_tasks({"third": 9, "second": 5}, 3, 5, 9) == [None, 2, 1, 3]


def test_account_shows_only_known_balances(metrics: Metrics) -> None:
    observed = AccountState(
        unexplained_money_fen=40,
        unknown_outcomes=1,
        count=BalanceReading(7, 1_000, 2_000, ReadingSource.CHECK),
        money=BalanceReading(1250, 1_000, 4_000, ReadingSource.CHECK),
    )
    new = AccountSample("new", AccountPolicy(floor_money_fen=500), AccountState(), 9_000)
    main = AccountSample("main", AccountPolicy(), observed, 9_000)
    metrics.ledger_collector.set_snapshot(MetricsSnapshot(accounts=[new, main]))

    def read(account: str, *names: str) -> list[float | None]:
        return [read_sample(metrics, f"account_{name}", account=account) for name in names]

    assert read("new", "remaining_yuan", "floor_yuan") == [None, 5]
    assert read("main", "remaining_yuan", "remaining_uses", "balance_age_seconds") == [12.5, 7, 5]
    assert read("main", "unexplained_yuan_total", "unknown_submissions") == [0.4, 1]


TEXTS = st.text(max_size=12) | st.sampled_from(["\\", '"', "\n", '\\"\n', "é漢", "a,b=c"])


@given(TEXTS, TEXTS, st.floats() | st.integers(-(2**60), 2**60).map(float))
def test_text_format_is_that_of_the_library(documentation: str, label: str, number: float) -> None:
    registry = CollectorRegistry()
    Gauge("gateway_a", documentation, ("one", "two"), registry=registry).labels(label, "x").set(number)
    assert format_exposition(registry) == generate_latest(registry)


def test_whole_scrape(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.label_names.read_registry = lambda: REGISTRY
    metrics.ledger_collector.set_snapshot(
        MetricsSnapshot(quotas=[QuotaSample("shop", "day-money", "yuan", 1.5, 0.5, 10)])
    )
    metrics.label_names.refresh()
    families = list(metrics.registry.collect())
    monkeypatch.setattr(metrics.registry, "collect", lambda: iter(families))
    body = metrics.render()[0]
    assert body == generate_latest(metrics.registry)
    assert b"gateway_quota_used" in body
    assert b"_created" not in body  # they would add half to the size of a scrape
