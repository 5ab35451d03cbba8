"""What the gateway counts."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Gauge

from service.domain.ledger import AccountState, Figure
from service.domain.ledger import Source as Call
from service.domain.tasks import Basis, Cost, Kind
from service.domain.tenants import AccountPolicy
from service.domain.webhooks import DeliveryState
from service.telemetry.gauges import AccountStanding, Level
from service.telemetry.metrics import LedgerOutcome, Metrics, Port, Source, StoreError
from tests.unit.metered import DESCRIBING, KNOWN, SEEN, Outcome, ended, registry_of, value


@pytest.fixture
def metrics() -> Metrics:
    """The metrics of a process that has just started."""
    return Metrics(CollectorRegistry(), version="1.2.3")


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
    metrics.replayed()
    metrics.checked(Outcome.GOOD)
    metrics.read(Source.MEMORY)
    metrics.expired(2)
    metrics.store_error(StoreError.TIMEOUT)
    metrics.ledger("reserve", LedgerOutcome.OK, 0.25)
    metrics.loop_lag(0.5)
    assert value(metrics, "gateway_upstream_requests_total", operation="good", outcome="good") == 1
    assert value(metrics, "gateway_upstream_request_duration_seconds_sum", operation="good", outcome="good") == 3
    assert value(metrics, "gateway_submissions_total", kind="upscale", outcome="good") == 1
    assert value(metrics, "gateway_idempotent_replays_total") == 1
    assert value(metrics, "gateway_watch_checks_total", answer="good") == 1
    assert value(metrics, "gateway_task_reads_total", source="memory") == 1
    assert value(metrics, "gateway_reservations_expired_total") == 2
    assert value(metrics, "gateway_redis_errors_total", error="timeout") == 1
    assert value(metrics, "gateway_ledger_calls_total", call="reserve", outcome="ok") == 1
    assert value(metrics, "gateway_ledger_call_duration_seconds_sum", call="reserve") == 0.25
    assert value(metrics, "gateway_event_loop_lag_seconds_sum") == 0.5


def test_an_ended_task_counts_for_its_tenant_and_its_account(metrics: Metrics) -> None:
    """What a task took is counted in yuan, by who had it done, and by what paid for it."""
    metrics.name_tenants(lambda: KNOWN)
    metrics.submitted(1, Kind.SEAMLESS)
    metrics.finished(ended(Cost(1, 250, Basis.ESTIMATED)))
    of_shop = {"tenant": "shop", "kind": "seamless"}
    assert value(metrics, "gateway_tasks_submitted_total", **of_shop) == 1
    assert value(metrics, "gateway_tasks_finished_total", **of_shop, state="failed") == 1
    assert value(metrics, "gateway_tenant_task_duration_seconds_sum", **of_shop) == 7
    assert value(metrics, "gateway_task_duration_seconds_bucket", kind="seamless", state="failed", le="10.0") == 1
    assert value(metrics, "gateway_spent_uses_total", **of_shop) == 1
    assert value(metrics, "gateway_spent_yuan_total", **of_shop) == 2.5
    assert value(metrics, "gateway_account_spent_uses_total", account="main") == 1
    assert value(metrics, "gateway_account_spent_yuan_total", account="main") == 2.5
    assert value(metrics, "gateway_receipts_total", kind="seamless", basis="estimated") == 1


def test_what_is_known_beforehand_begins_at_zero(metrics: Metrics) -> None:
    """An increase from nothing is seen too: of tenants, accounts, outcomes, faults of routes, and calls."""
    metrics.name_tenants(lambda: KNOWN)
    metrics.expect_routes(Port.TENANTS, [("GET", "/v1/quota")])
    metrics.expect_calls({Outcome.GOOD: Outcome})
    metrics.expect_submissions(Outcome, Outcome)
    metrics.expect_scripts(["reserve"])
    metrics.refresh()
    assert value(metrics, "gateway_http_requests_total", route="/v1/quota", method="GET", status="503") == 0
    assert value(metrics, "gateway_upstream_requests_total", operation="good", outcome="good") == 0
    assert value(metrics, "gateway_submissions_total", kind="upscale", outcome="good") == 0
    assert value(metrics, "gateway_watch_checks_total", answer="good") == 0
    assert value(metrics, "gateway_ledger_calls_total", call="reserve", outcome="unavailable") == 0
    assert value(metrics, "gateway_redis_errors_total", error="connection") == 0
    assert value(metrics, "gateway_webhook_attempts_total", state="failed") == 0
    assert value(metrics, "gateway_account_spent_yuan_total", account="main") == 0
    for policy in ("day-tasks", "month-money", "max-active", "balance"):
        assert value(metrics, "gateway_quota_denials_total", tenant="shop", policy=policy) == 0
    assert value(metrics, "gateway_quota_denials_total", policy="day-money") is None
    for name in ("tasks_submitted", "tasks_finished", "spent_uses", "spent_yuan"):
        assert value(metrics, f"gateway_{name}_total", tenant="shop", kind="upscale") == 0
        assert value(metrics, f"gateway_{name}_total", tenant="shop", kind="vectorize") is None


def test_denials_are_counted_by_tenant_and_policy(metrics: Metrics) -> None:
    """A policy that refused is counted for its tenant, as is a balance that no policy is about."""
    metrics.name_tenants(lambda: KNOWN)
    metrics.denied(1, "day-tasks")
    metrics.unpaid(1)
    assert value(metrics, "gateway_quota_denials_total", tenant="shop", policy="day-tasks") == 1
    assert value(metrics, "gateway_quota_denials_total", tenant="shop", policy="balance") == 1


def test_tenants_beyond_the_cap_share_one_name() -> None:
    """However many tenants there are, only the oldest have metrics of their own: in every process the same ones."""
    metrics = Metrics(CollectorRegistry(), most_tenants=2)
    metrics.name_tenants(lambda: registry_of("third", "first", "second", ids=(9, 3, 5)))
    assert [metrics.tenant(each) for each in (3, 5, 9, 77)] == ["first", "second", "other", "other"]
    for tenant in (3, 5, 9, 77):
        metrics.submitted(tenant, Kind.UPSCALE)
    counted = {
        each: value(metrics, "gateway_tasks_submitted_total", tenant=each) for each in ("first", "other", "third")
    }
    assert counted == {"first": 1, "other": 2, "third": None}


def test_a_tenant_that_is_gone_takes_its_metrics_along() -> None:
    """Names that come and go do not add up: the next tenant gets the place, and nothing is left of the former one."""
    metrics = Metrics(CollectorRegistry(), most_tenants=1)
    held = [registry_of("first", "second", ids=(1, 2))]
    metrics.name_tenants(lambda: held[0])
    metrics.submitted(1, Kind.UPSCALE)
    metrics.submitted(2, Kind.UPSCALE)
    held[0] = registry_of("second", ids=(2,))
    metrics.refresh()
    metrics.submitted(1, Kind.UPSCALE)
    metrics.submitted(2, Kind.UPSCALE)
    names = ("first", "second", "other")
    counted = {each: value(metrics, "gateway_tasks_submitted_total", tenant=each, kind="upscale") for each in names}
    assert counted == {"first": None, "second": 1, "other": 2}


def test_an_end_of_a_delivery_tells_its_age(metrics: Metrics) -> None:
    """A delivery that is tried again has no age yet."""
    metrics.delivered(DeliveryState.PENDING, 3)
    metrics.delivered(DeliveryState.FAILED, 40)
    attempts = [value(metrics, "gateway_webhook_attempts_total", state=each) for each in ("pending", "failed")]
    ages = [value(metrics, "gateway_webhook_age_seconds_sum", state=each) for each in ("pending", "failed")]
    assert (attempts, ages) == ([1, 1], [None, 40])


def test_a_batch_tells_how_late_each_check_is(metrics: Metrics) -> None:
    """Every claimed check has its lag, every claim its size, one of nothing too."""
    metrics.claimed(iter([0.2, 3]))
    metrics.claimed(iter([]))
    assert value(metrics, "gateway_watch_lag_seconds_sum") == 3.2
    assert value(metrics, "gateway_watch_lag_seconds_count") == 2
    assert value(metrics, "gateway_watch_batch_size_sum") == 2
    assert value(metrics, "gateway_watch_batch_size_count") == 2


def test_levels_are_asked_for_at_each_scrape(metrics: Metrics) -> None:
    """A gauge shows what those say who know, of all of them, and is not there if nobody does."""
    held: dict[tuple[str, ...], float] = {("main",): 1.0}
    metrics.levels.tell(Level.BREAKER, lambda: held)
    metrics.levels.tell(Level.BREAKER, lambda: {("spare",): 0.0})
    assert value(metrics, "gateway_upstream_breaker_open", upstream="main") == 1
    held[("main",)] = 0.0
    assert value(metrics, "gateway_upstream_breaker_open", upstream="main") == 0
    assert value(metrics, "gateway_upstream_breaker_open", upstream="spare") == 0
    assert value(metrics, "gateway_settlements_waiting") is None


def test_when_a_series_began_is_not_told(metrics: Metrics) -> None:
    """It would make every scrape half as large again."""
    assert b"_created" not in metrics.render()[0]


def test_all_families_describe_themselves(metrics: Metrics) -> None:
    """Each metric that a scrape shows is described, with its labels, before there is anything to show of it."""
    metrics.name_tenants(lambda: KNOWN)
    metrics.standing.show(SEEN)
    metrics.refresh()
    collectors = [each for each in metrics.registry._collector_to_names if isinstance(each, DESCRIBING)]
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
    assert value(metrics, "gateway_build_info", version="1.2.3") == 1


def test_what_the_ledger_says_is_shown_until_it_can_not_be_read(metrics: Metrics) -> None:
    """Old figures are not shown for new: without the ledger, there is but the word that it is away."""
    assert value(metrics, "gateway_ledger_up") == 0
    metrics.standing.show(SEEN)
    of_day = {"tenant": "shop", "policy": "day-money", "unit": "yuan"}
    found = [value(metrics, f"gateway_quota_{each}", **of_day) for each in ("used", "reserved", "limit")]
    assert (found, value(metrics, "gateway_ledger_up")) == ([1.5, 0.5, 10], 1)
    assert value(metrics, "gateway_tasks_active", tenant="shop", kind="upscale") == 2
    assert value(metrics, "gateway_tenant_spent_yuan", tenant="shop", window="day") == 1.5
    assert value(metrics, "gateway_webhook_overdue_seconds") == 1.5
    assert value(metrics, "gateway_webhooks_failed") == 3
    metrics.standing.show(None)
    assert (value(metrics, "gateway_quota_used"), value(metrics, "gateway_ledger_up")) == (None, 0)


def test_an_account_shows_only_what_was_seen_of_it(metrics: Metrics) -> None:
    """A balance nobody has seen is not zero; what was seen is shown with its age, and with what nobody can explain."""
    state = AccountState(unexplained_money=40, unknown=1, open=2)
    new = AccountStanding("new", AccountPolicy(floor_money=500), state, 9_000)
    seen = msgspec.structs.replace(
        state, count=Figure(7, 1_000, 2_000, Call.CHECK), money=Figure(1250, 1_000, 4_000, Call.CHECK)
    )
    metrics.standing.show(
        msgspec.structs.replace(SEEN, accounts=[new, AccountStanding("main", AccountPolicy(), seen, 9_000)])
    )
    assert value(metrics, "gateway_account_remaining_yuan", account="new") is None
    assert value(metrics, "gateway_account_since_seen_seconds", account="new") is None
    assert value(metrics, "gateway_account_floor_yuan", account="new") == 5
    assert value(metrics, "gateway_account_remaining_yuan", account="main") == 12.5
    assert value(metrics, "gateway_account_remaining_uses", account="main") == 7
    assert value(metrics, "gateway_account_since_seen_seconds", account="main") == 5
    assert value(metrics, "gateway_account_unexplained_yuan_total", account="main") == 0.4
    assert value(metrics, "gateway_account_unknown_submissions", account="main") == 1
    states = [value(metrics, "gateway_account_state", account="main", state=each) for each in ("open", "exhausted")]
    assert states == [1, 0]


def test_others_can_add_to_the_registry(metrics: Metrics) -> None:
    """What is put on the registry elsewhere is rendered with the rest."""
    Gauge("gateway_elsewhere", "Something else.", registry=metrics.registry).set(7)
    assert value(metrics, "gateway_elsewhere") == 7
