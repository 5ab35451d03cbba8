"""What the gateway counts."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Gauge

from service.domain.ledger import AccountState, BalanceReading
from service.domain.ledger import ReadingSource as Call
from service.domain.tasks import Cost, CostBasis, Kind
from service.domain.tenants import AccountPolicy
from service.domain.webhooks import DeliveryState
from service.telemetry.gauges import AccountSample, GaugeName
from service.telemetry.metrics import Metrics, Port, ReadSource, RedisErrorKind, RedisOutcome
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
    """The metrics of a process that has just started."""
    return Metrics(CollectorRegistry(), version="1.2.3")


def test_requests_are_counted_and_timed(metrics: Metrics) -> None:
    """A request counts under its method, route and status, and its duration under its route."""
    for seconds in (0.2, 0.4):
        metrics.record_request(Port.TENANTS, "GET", "/v1/tasks/{task_id}", 200, seconds)
    metrics.record_request(Port.OPERATORS, "GET", "/v1/tasks/{task_id}", 200, 1)
    labels = {"port": "tenants", "method": "GET", "route": "/v1/tasks/{task_id}"}
    assert read_sample(metrics, "gateway_http_requests_total", **labels, status="200") == 2
    assert read_sample(metrics, "gateway_http_request_duration_seconds_sum", **labels) == pytest.approx(0.6)
    assert read_sample(metrics, "gateway_http_request_duration_seconds_bucket", **labels, le="0.25") == 1


def test_unknown_methods_share_one_label(metrics: Metrics) -> None:
    """A client can't make new time series by making up methods."""
    for method in ("BREW", "get", "PROPFIND"):
        metrics.record_request(Port.TENANTS, method, "/", 405, 0.1)
    assert read_sample(metrics, "gateway_http_requests_total", method="other") == 3


def test_requests_under_way_are_counted_until_they_end(metrics: Metrics) -> None:
    """A request is in progress within the block, however it ends."""

    def crash() -> None:
        with metrics.track_request(Port.TENANTS):
            assert read_sample(metrics, "gateway_http_requests_in_progress", port="tenants") == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    assert read_sample(metrics, "gateway_http_requests_in_progress", port="tenants") == 0


def test_each_event_has_its_counter(metrics: Metrics) -> None:
    """What callers report is found under the labels they gave."""
    metrics.record_upstream_call(SampleOutcome.GOOD, SampleOutcome.GOOD, 3)
    metrics.record_submission(Kind.UPSCALE, SampleOutcome.GOOD)
    metrics.record_replay()
    metrics.record_check(SampleOutcome.GOOD)
    metrics.record_task_read(ReadSource.MEMORY)
    metrics.record_expired_reservations(2)
    metrics.record_redis_error(RedisErrorKind.TIMEOUT)
    metrics.record_redis_call("reserve", RedisOutcome.OK, 0.25)
    metrics.record_loop_lag(0.5)
    assert read_sample(metrics, "gateway_upstream_requests_total", operation="good", outcome="good") == 1
    assert read_sample(metrics, "gateway_upstream_request_duration_seconds_sum", operation="good", outcome="good") == 3
    assert read_sample(metrics, "gateway_submissions_total", kind="upscale", outcome="good") == 1
    assert read_sample(metrics, "gateway_idempotent_replays_total") == 1
    assert read_sample(metrics, "gateway_poll_checks_total", outcome="good") == 1
    assert read_sample(metrics, "gateway_task_reads_total", source="memory") == 1
    assert read_sample(metrics, "gateway_reservations_expired_total") == 2
    assert read_sample(metrics, "gateway_redis_errors_total", error="timeout") == 1
    assert read_sample(metrics, "gateway_redis_calls_total", command="reserve", outcome="ok") == 1
    assert read_sample(metrics, "gateway_redis_call_duration_seconds_sum", command="reserve") == 0.25
    assert read_sample(metrics, "gateway_event_loop_lag_seconds_sum") == 0.5


def test_an_ended_task_counts_for_its_tenant_and_its_account(metrics: Metrics) -> None:
    """What a task took is counted in yuan, by who had it done, and by what paid for it."""
    metrics.set_registry_source(lambda: REGISTRY)
    metrics.record_submitted_task(1, Kind.SEAMLESS)
    metrics.record_finished_task(make_finished_task(Cost(1, 250, CostBasis.ESTIMATED)))
    of_shop = {"tenant": "shop", "kind": "seamless"}
    assert read_sample(metrics, "gateway_tasks_submitted_total", **of_shop) == 1
    assert read_sample(metrics, "gateway_tasks_finished_total", **of_shop, state="failed") == 1
    assert read_sample(metrics, "gateway_tenant_task_duration_seconds_sum", **of_shop) == 7
    assert read_sample(metrics, "gateway_task_duration_seconds_bucket", kind="seamless", state="failed", le="10.0") == 1
    assert read_sample(metrics, "gateway_spent_uses_total", **of_shop) == 1
    assert read_sample(metrics, "gateway_spent_yuan_total", **of_shop) == 2.5
    assert read_sample(metrics, "gateway_account_spent_uses_total", account="main") == 1
    assert read_sample(metrics, "gateway_account_spent_yuan_total", account="main") == 2.5
    assert read_sample(metrics, "gateway_task_costs_total", kind="seamless", basis="estimated") == 1


def test_what_is_known_beforehand_begins_at_zero(metrics: Metrics) -> None:
    """An increase from nothing is seen too: of tenants, accounts, outcomes, faults of routes, and calls."""
    metrics.set_registry_source(lambda: REGISTRY)
    metrics.preregister_routes(Port.TENANTS, [("GET", "/v1/quota")])
    metrics.preregister_upstream_calls({SampleOutcome.GOOD: SampleOutcome})
    metrics.preregister_submissions(SampleOutcome, SampleOutcome)
    metrics.preregister_scripts(["reserve"])
    metrics.refresh_labels()
    assert read_sample(metrics, "gateway_http_requests_total", route="/v1/quota", method="GET", status="503") == 0
    assert read_sample(metrics, "gateway_upstream_requests_total", operation="good", outcome="good") == 0
    assert read_sample(metrics, "gateway_submissions_total", kind="upscale", outcome="good") == 0
    assert read_sample(metrics, "gateway_poll_checks_total", outcome="good") == 0
    assert read_sample(metrics, "gateway_redis_calls_total", command="reserve", outcome="unavailable") == 0
    assert read_sample(metrics, "gateway_redis_errors_total", error="connection") == 0
    assert read_sample(metrics, "gateway_webhook_attempts_total", state="failed") == 0
    assert read_sample(metrics, "gateway_account_spent_yuan_total", account="main") == 0
    for policy in ("day-tasks", "month-money", "max-active", "balance"):
        assert read_sample(metrics, "gateway_quota_denials_total", tenant="shop", policy=policy) == 0
    assert read_sample(metrics, "gateway_quota_denials_total", policy="day-money") is None
    for name in ("tasks_submitted", "tasks_finished", "spent_uses", "spent_yuan"):
        assert read_sample(metrics, f"gateway_{name}_total", tenant="shop", kind="upscale") == 0
        assert read_sample(metrics, f"gateway_{name}_total", tenant="shop", kind="vectorize") is None


def test_denials_are_counted_by_tenant_and_policy(metrics: Metrics) -> None:
    """A policy that refused is counted for its tenant, as is a balance that no policy is about."""
    metrics.set_registry_source(lambda: REGISTRY)
    metrics.record_quota_denial(1, "day-tasks")
    metrics.record_balance_denial(1)
    assert read_sample(metrics, "gateway_quota_denials_total", tenant="shop", policy="day-tasks") == 1
    assert read_sample(metrics, "gateway_balance_denials_total", tenant="shop") == 1


def test_tenants_beyond_the_cap_share_one_name() -> None:
    """However many tenants there are, only the oldest have metrics of their own: in every process the same ones."""
    metrics = Metrics(CollectorRegistry(), max_named_tenants=2)
    metrics.set_registry_source(lambda: make_registry("third", "first", "second", ids=(9, 3, 5)))
    assert [metrics.tenant_label(each) for each in (3, 5, 9, 77)] == ["first", "second", "other", "other"]
    for tenant in (3, 5, 9, 77):
        metrics.record_submitted_task(tenant, Kind.UPSCALE)
    counted = {
        each: read_sample(metrics, "gateway_tasks_submitted_total", tenant=each) for each in ("first", "other", "third")
    }
    assert counted == {"first": 1, "other": 2, "third": None}


def test_a_tenant_that_is_gone_takes_its_metrics_along() -> None:
    """Names that come and go do not add up: the next tenant gets the place, and nothing is left of the former one."""
    metrics = Metrics(CollectorRegistry(), max_named_tenants=1)
    held = [make_registry("first", "second", ids=(1, 2))]
    metrics.set_registry_source(lambda: held[0])
    metrics.record_submitted_task(1, Kind.UPSCALE)
    metrics.record_submitted_task(2, Kind.UPSCALE)
    held[0] = make_registry("second", ids=(2,))
    metrics.refresh_labels()
    metrics.record_submitted_task(1, Kind.UPSCALE)
    metrics.record_submitted_task(2, Kind.UPSCALE)
    names = ("first", "second", "other")
    counted = {
        each: read_sample(metrics, "gateway_tasks_submitted_total", tenant=each, kind="upscale") for each in names
    }
    assert counted == {"first": None, "second": 1, "other": 2}


def test_an_end_of_a_delivery_tells_its_age(metrics: Metrics) -> None:
    """A delivery that is tried again has no age yet."""
    metrics.record_delivery(DeliveryState.PENDING, 3)
    metrics.record_delivery(DeliveryState.FAILED, 40)
    attempts = [read_sample(metrics, "gateway_webhook_attempts_total", state=each) for each in ("pending", "failed")]
    ages = [read_sample(metrics, "gateway_webhook_age_seconds_sum", state=each) for each in ("pending", "failed")]
    assert (attempts, ages) == ([1, 1], [None, 40])


def test_a_batch_tells_how_late_each_check_is(metrics: Metrics) -> None:
    """Every claimed check has its lag, every claim its size, one of nothing too."""
    metrics.record_claimed_checks(iter([0.2, 3]))
    metrics.record_claimed_checks(iter([]))
    assert read_sample(metrics, "gateway_poll_lag_seconds_sum") == 3.2
    assert read_sample(metrics, "gateway_poll_lag_seconds_count") == 2
    assert read_sample(metrics, "gateway_poll_batch_size_sum") == 2
    assert read_sample(metrics, "gateway_poll_batch_size_count") == 2


def test_levels_are_asked_for_at_each_scrape(metrics: Metrics) -> None:
    """A gauge shows what those say who know, of all of them, and is not there if nobody does."""
    held: dict[tuple[str, ...], float] = {("main",): 1.0}
    metrics.gauges.register(GaugeName.UPSTREAM_BREAKER_OPEN, lambda: held)
    metrics.gauges.register(GaugeName.UPSTREAM_BREAKER_OPEN, lambda: {("spare",): 0.0})
    assert read_sample(metrics, "gateway_upstream_breaker_open", upstream="main") == 1
    held[("main",)] = 0.0
    assert read_sample(metrics, "gateway_upstream_breaker_open", upstream="main") == 0
    assert read_sample(metrics, "gateway_upstream_breaker_open", upstream="spare") == 0
    assert read_sample(metrics, "gateway_settlements_pending") is None


def test_when_a_series_began_is_not_told(metrics: Metrics) -> None:
    """It would make every scrape half as large again."""
    assert b"_created" not in metrics.render()[0]


def test_all_families_describe_themselves(metrics: Metrics) -> None:
    """Each metric that a scrape shows is described, with its labels, before there is anything to show of it."""
    metrics.set_registry_source(lambda: REGISTRY)
    metrics.ledger_collector.set_snapshot(SNAPSHOT)
    metrics.refresh_labels()
    collectors = [each for each in metrics.registry._collector_to_names if isinstance(each, GATEWAY_COLLECTORS)]
    described = {family.name: family for each in collectors for family in each.describe()}
    shown = [family for family in metrics.registry.collect() if family.name.startswith("gateway_")]
    assert {family.name for family in shown} <= set(described)
    for family in shown:
        assert (described[family.name].type, described[family.name].documentation) == (
            family.type,
            family.documentation,
        )


def test_the_build_is_told(metrics: Metrics) -> None:
    """The version that runs is a label of a constant."""
    assert read_sample(metrics, "gateway_build_info", version="1.2.3") == 1


def test_what_the_ledger_says_is_shown_until_it_can_not_be_read(metrics: Metrics) -> None:
    """Old figures are not shown for new: without the ledger, there is but the word that it is away."""
    assert read_sample(metrics, "gateway_redis_up") == 0
    metrics.ledger_collector.set_snapshot(SNAPSHOT)
    of_day = {"tenant": "shop", "policy": "day-money", "unit": "yuan"}
    found = [read_sample(metrics, f"gateway_quota_{each}", **of_day) for each in ("used", "reserved", "limit")]
    assert (found, read_sample(metrics, "gateway_redis_up")) == ([1.5, 0.5, 10], 1)
    assert read_sample(metrics, "gateway_tasks_active", tenant="shop", kind="upscale") == 2
    assert read_sample(metrics, "gateway_tenant_spent_yuan", tenant="shop", window="day") == 1.5
    assert read_sample(metrics, "gateway_webhook_overdue_seconds") == 1.5
    assert read_sample(metrics, "gateway_webhooks_failed") == 3
    metrics.ledger_collector.set_snapshot(None)
    assert (read_sample(metrics, "gateway_quota_used"), read_sample(metrics, "gateway_redis_up")) == (None, 0)


def test_an_account_shows_only_what_was_seen_of_it(metrics: Metrics) -> None:
    """A balance nobody has seen is not zero; what was seen is shown with its age, and with what nobody can explain."""
    state = AccountState(unexplained_money_fen=40, unknown_outcomes=1, open_submissions=2)
    new = AccountSample("new", AccountPolicy(floor_money_fen=500), state, 9_000)
    seen = msgspec.structs.replace(
        state, count=BalanceReading(7, 1_000, 2_000, Call.CHECK), money=BalanceReading(1250, 1_000, 4_000, Call.CHECK)
    )
    metrics.ledger_collector.set_snapshot(
        msgspec.structs.replace(SNAPSHOT, accounts=[new, AccountSample("main", AccountPolicy(), seen, 9_000)])
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
        read_sample(metrics, "gateway_account_state", account="main", state=each) for each in ("open", "exhausted")
    ]
    assert states == [1, 0]


def test_others_can_add_to_the_registry(metrics: Metrics) -> None:
    """What is put on the registry elsewhere is rendered with the rest."""
    Gauge("gateway_elsewhere", "Something else.", registry=metrics.registry).set(7)
    assert read_sample(metrics, "gateway_elsewhere") == 7
