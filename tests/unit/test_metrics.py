"""Metrics of the gateway."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Gauge

from service import __version__
from service.domain.ledger import AccountState, BalanceReading
from service.domain.ledger import ReadingSource as Call
from service.domain.tasks import Cost, CostBasis, Kind
from service.domain.tenants import AccountPolicy
from service.domain.webhooks import DeliveryState
from service.telemetry.gauges import AccountSample, GaugeName
from service.telemetry.metrics import Metrics, Port, RedisOutcome, preregister
from tests.unit.metric_samples import (
    GATEWAY_COLLECTORS,
    REGISTRY,
    SNAPSHOT,
    SampleOutcome,
    make_finished_task,
    make_registry,
    read_sample,
)


@pytest.fixture
def metrics() -> Metrics:
    """Metrics of a new process."""
    return Metrics(CollectorRegistry())


def test_requests_are_counted_and_timed(metrics: Metrics) -> None:
    for seconds in (0.2, 0.4):
        metrics.record_request(Port.TENANTS, "GET", "/v1/tasks/{task_id}", 200, seconds)
    metrics.record_request(Port.OPERATORS, "GET", "/v1/tasks/{task_id}", 200, 1)
    labels = {"port": "tenants", "method": "GET", "route": "/v1/tasks/{task_id}"}
    assert read_sample(metrics, "gateway_http_requests_total", **labels, status="200") == 2
    assert read_sample(metrics, "gateway_http_request_duration_seconds_sum", **labels) == pytest.approx(0.6)
    assert read_sample(metrics, "gateway_http_request_duration_seconds_bucket", **labels, le="0.25") == 1


def test_unknown_methods_share_one_label(metrics: Metrics) -> None:
    for method in ("BREW", "get", "PROPFIND"):
        metrics.record_request(Port.TENANTS, method, "/", 405, 0.1)
    assert read_sample(metrics, "gateway_http_requests_total", method="other") == 3


def test_requests_in_progress_are_counted(metrics: Metrics) -> None:
    def crash() -> None:
        with metrics.track_request(Port.TENANTS):
            assert read_sample(metrics, "gateway_http_requests_in_progress", port="tenants") == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    assert read_sample(metrics, "gateway_http_requests_in_progress", port="tenants") == 0


def test_calls_are_counted_and_timed(metrics: Metrics) -> None:
    metrics.record_upstream_call(SampleOutcome.GOOD, SampleOutcome.GOOD, 3)
    metrics.record_redis_call("reserve", RedisOutcome.OK, 0.25)
    assert read_sample(metrics, "gateway_upstream_requests_total", operation="good", outcome="good") == 1
    assert read_sample(metrics, "gateway_upstream_request_duration_seconds_sum", operation="good", outcome="good") == 3
    assert read_sample(metrics, "gateway_redis_calls_total", command="reserve", outcome="ok") == 1
    assert read_sample(metrics, "gateway_redis_call_duration_seconds_sum", command="reserve") == 0.25


def test_finished_task_counts_for_tenant_and_account(metrics: Metrics) -> None:
    metrics.label_names.read_registry = lambda: REGISTRY
    metrics.record_finished_task(make_finished_task(Cost(1, 250, CostBasis.ESTIMATED)))
    of_shop = {"tenant": "shop", "kind": "seamless"}
    assert read_sample(metrics, "gateway_tasks_finished_total", **of_shop, state="failed") == 1
    assert read_sample(metrics, "gateway_tenant_task_duration_seconds_sum", **of_shop) == 7
    assert read_sample(metrics, "gateway_task_duration_seconds_bucket", kind="seamless", state="failed", le="10.0") == 1
    assert read_sample(metrics, "gateway_spent_uses_total", **of_shop) == 1
    assert read_sample(metrics, "gateway_spent_yuan_total", **of_shop) == 2.5
    assert read_sample(metrics, "gateway_account_spent_uses_total", account="main") == 1
    assert read_sample(metrics, "gateway_account_spent_yuan_total", account="main") == 2.5
    assert read_sample(metrics, "gateway_task_costs_total", kind="seamless", basis="estimated") == 1


def test_known_series_start_at_zero(metrics: Metrics) -> None:
    """Otherwise `increase()` misses the first event."""
    metrics.label_names.read_registry = lambda: REGISTRY
    preregister(metrics.redis_calls, ["reserve"], RedisOutcome)
    metrics.label_names.refresh()
    assert read_sample(metrics, "gateway_redis_calls_total", command="reserve", outcome="unavailable") == 0
    assert read_sample(metrics, "gateway_redis_errors_total", error="connection") == 0
    assert read_sample(metrics, "gateway_webhook_attempts_total", state="failed") == 0
    assert read_sample(metrics, "gateway_account_spent_yuan_total", account="main") == 0
    for policy in ("day-tasks", "month-money", "max-active"):
        assert read_sample(metrics, "gateway_quota_denials_total", tenant="shop", policy=policy) == 0
    assert read_sample(metrics, "gateway_balance_denials_total", tenant="shop") == 0
    assert read_sample(metrics, "gateway_quota_denials_total", policy="day-money") is None
    for name in ("tasks_submitted", "tasks_finished", "spent_uses", "spent_yuan"):
        assert read_sample(metrics, f"gateway_{name}_total", tenant="shop", kind="upscale") == 0
        assert read_sample(metrics, f"gateway_{name}_total", tenant="shop", kind="vectorize") is None


def count_submitted_task(metrics: Metrics, tenant: int) -> None:
    metrics.tasks_submitted.labels(metrics.label_names.of_tenant(tenant), Kind.UPSCALE).inc()


def test_tenants_beyond_the_cap_share_a_label() -> None:
    metrics = Metrics(CollectorRegistry(), max_named_tenants=2)
    metrics.label_names.read_registry = lambda: make_registry("third", "first", "second", ids=(9, 3, 5))
    assert [metrics.label_names.of_tenant(value) for value in (3, 5, 9, 77)] == ["first", "second", "other", "other"]
    for tenant in (3, 5, 9, 77):
        count_submitted_task(metrics, tenant)
    counted = {
        name: read_sample(metrics, "gateway_tasks_submitted_total", tenant=name) for name in ("first", "other", "third")
    }
    assert counted == {"first": 1, "other": 2, "third": None}


def test_deleted_tenant_loses_its_series() -> None:
    metrics = Metrics(CollectorRegistry(), max_named_tenants=1)
    registries = [make_registry("first", "second", ids=(1, 2))]
    metrics.label_names.read_registry = lambda: registries[0]
    count_submitted_task(metrics, 1)
    count_submitted_task(metrics, 2)
    registries[0] = make_registry("second", ids=(2,))
    metrics.label_names.refresh()
    count_submitted_task(metrics, 1)
    count_submitted_task(metrics, 2)
    names = ("first", "second", "other")
    counted = {
        name: read_sample(metrics, "gateway_tasks_submitted_total", tenant=name, kind="upscale") for name in names
    }
    assert counted == {"first": None, "second": 1, "other": 2}


def test_finished_delivery_observes_its_age(metrics: Metrics) -> None:
    metrics.record_delivery(DeliveryState.PENDING, 3)
    metrics.record_delivery(DeliveryState.FAILED, 40)
    attempts = [read_sample(metrics, "gateway_webhook_attempts_total", state=name) for name in ("pending", "failed")]
    ages = [read_sample(metrics, "gateway_webhook_age_seconds_sum", state=name) for name in ("pending", "failed")]
    assert (attempts, ages) == ([1, 1], [None, 40])


def test_gauges_are_read_at_each_scrape(metrics: Metrics) -> None:
    values: dict[tuple[str, ...], float] = {("main",): 1.0}
    metrics.gauges.register(GaugeName.UPSTREAM_BREAKER_OPEN, lambda: values)
    metrics.gauges.register(GaugeName.UPSTREAM_BREAKER_OPEN, lambda: {("spare",): 0.0})
    assert read_sample(metrics, "gateway_upstream_breaker_open", upstream="main") == 1
    values[("main",)] = 0.0
    assert read_sample(metrics, "gateway_upstream_breaker_open", upstream="main") == 0
    assert read_sample(metrics, "gateway_upstream_breaker_open", upstream="spare") == 0
    assert read_sample(metrics, "gateway_settlements_pending") is None


def test_no_created_series(metrics: Metrics) -> None:
    """They would add half to the size of a scrape."""
    assert b"_created" not in metrics.render()[0]


def test_all_metrics_are_described(metrics: Metrics) -> None:
    metrics.label_names.read_registry = lambda: REGISTRY
    metrics.ledger_collector.set_snapshot(SNAPSHOT)
    metrics.label_names.refresh()
    collectors = [
        collector_to_name
        for collector_to_name in metrics.registry._collector_to_names
        if isinstance(collector_to_name, GATEWAY_COLLECTORS)
    ]
    described = {family.name: family for collector in collectors for family in collector.describe()}
    families = [family for family in metrics.registry.collect() if family.name.startswith("gateway_")]
    assert {family.name for family in families} <= set(described)
    for family in families:
        assert (described[family.name].type, described[family.name].documentation) == (
            family.type,
            family.documentation,
        )


def test_build_info(metrics: Metrics) -> None:
    assert read_sample(metrics, "gateway_build_info", version=__version__) == 1


def test_ledger_metrics_disappear_with_the_ledger(metrics: Metrics) -> None:
    assert read_sample(metrics, "gateway_redis_up") == 0
    metrics.ledger_collector.set_snapshot(SNAPSHOT)
    of_day = {"tenant": "shop", "policy": "day-money", "unit": "yuan"}
    values = [read_sample(metrics, f"gateway_quota_{name}", **of_day) for name in ("used", "reserved", "limit")]
    assert (values, read_sample(metrics, "gateway_redis_up")) == ([1.5, 0.5, 10], 1)
    assert read_sample(metrics, "gateway_tasks_active", tenant="shop", kind="upscale") == 2
    assert read_sample(metrics, "gateway_tenant_spent_yuan", tenant="shop", window="day") == 1.5
    assert read_sample(metrics, "gateway_webhook_overdue_seconds") == 1.5
    assert read_sample(metrics, "gateway_webhooks_failed") == 3
    metrics.ledger_collector.set_snapshot(None)
    assert (read_sample(metrics, "gateway_quota_used"), read_sample(metrics, "gateway_redis_up")) == (None, 0)


def test_account_shows_only_known_balances(metrics: Metrics) -> None:
    state = AccountState(unexplained_money_fen=40, unknown_outcomes=1, open_submissions=2)
    new = AccountSample("new", AccountPolicy(floor_money_fen=500), state, 9_000)
    observed = msgspec.structs.replace(
        state, count=BalanceReading(7, 1_000, 2_000, Call.CHECK), money=BalanceReading(1250, 1_000, 4_000, Call.CHECK)
    )
    metrics.ledger_collector.set_snapshot(
        msgspec.structs.replace(SNAPSHOT, accounts=[new, AccountSample("main", AccountPolicy(), observed, 9_000)])
    )
    assert read_sample(metrics, "gateway_account_remaining_yuan", account="new") is None
    assert read_sample(metrics, "gateway_account_balance_age_seconds", account="new") is None
    assert read_sample(metrics, "gateway_account_floor_yuan", account="new") == 5
    assert read_sample(metrics, "gateway_account_remaining_yuan", account="main") == 12.5
    assert read_sample(metrics, "gateway_account_remaining_uses", account="main") == 7
    assert read_sample(metrics, "gateway_account_balance_age_seconds", account="main") == 5
    assert read_sample(metrics, "gateway_account_unexplained_yuan_total", account="main") == 0.4
    assert read_sample(metrics, "gateway_account_unknown_submissions", account="main") == 1
    states = [
        read_sample(metrics, "gateway_account_state", account="main", state=name) for name in ("open", "exhausted")
    ]
    assert states == [1, 0]


def test_foreign_collectors_are_rendered(metrics: Metrics) -> None:
    Gauge("gateway_elsewhere", "Something else.", registry=metrics.registry).set(7)
    assert read_sample(metrics, "gateway_elsewhere") == 7
