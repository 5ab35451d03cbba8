"""Telemetry of requests: access log, metrics and spans, the format of metrics, and the export of spans."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from functools import partial
from ipaddress import ip_network
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from litestar import Litestar, Request, Response, get
from litestar.exceptions import ImproperlyConfiguredException, PermissionDeniedException
from litestar.params import FromPath
from msgspec.structs import replace
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import LogCapture, capture_logs

from service.api import asgi
from service.api.asgi import RequestMiddleware
from service.api.errors import OUTCOME, ClientDisconnected, exception_handlers
from service.container import open_tracer
from service.domain.errors import NotFound, UpstreamFault
from service.domain.ledger import AccountState, BalanceReading, ReadingSource
from service.domain.tasks import Kind
from service.domain.tenants import Account, AccountPolicy, Limit, Registry, Tenant, TenantPolicy, Window
from service.telemetry import tracing, tracing_otel
from service.telemetry.exposition import FormattedCounter, FormattedGauges, format_exposition
from service.telemetry.gauges import AccountSample, MetricsSnapshot, QuotaSample
from service.telemetry.metrics import Metrics, Port, RedisOutcome, preregister
from service.telemetry.tracing import NOOP_TRACER
from tests.process.gateway import wait_until
from tests.support.network import reserve_port
from tests.support.traces import SPAN, TRACE, SpanRecorder, TraceCollector, run_collector
from tests.unit.asgi_client import App, call_app, make_http_scope, make_receive

ADMIN_TOKEN = "the-token-of-the-operators"


@get("/things/{thing:str}")
async def thing(request: Request[Any, Any, Any], thing: FromPath[str]) -> Response[str]:
    request.scope["state"]["tenant"] = "demo"
    errors: dict[str, Exception] = {
        "missing": NotFound("No such thing."),
        "crash": ZeroDivisionError("hunter2"),
        "unmapped": UpstreamFault("hunter2"),
        "framework": ImproperlyConfiguredException("hunter2"),
        "forbidden": PermissionDeniedException("hunter2"),
        "left": ClientDisconnected(),
    }
    if error := errors.get(thing):
        raise error
    if thing in {"transfer-aborted", "client-too-slow"}:
        request.scope["state"][OUTCOME] = thing
    return Response("")


class ObservedApp:
    """An application behind the middleware, with its log events, metrics and spans."""

    def __init__(self, app: App | None = None, recorder: SpanRecorder | None = None, *proxies: str) -> None:
        self.recorder = recorder or SpanRecorder(secrets=[ADMIN_TOKEN])
        capture, level = LogCapture(), structlog.make_filtering_bound_logger("INFO")
        processors = structlog.contextvars.merge_contextvars, capture
        logger = structlog.wrap_logger(None, processors=processors, wrapper_class=level)
        self.events = capture.entries
        handlers: dict[Any, Any] = dict(exception_handlers(logger))
        self.registry = CollectorRegistry()
        inner: Any = app or Litestar([thing], exception_handlers=handlers, openapi_config=None, logging_config=None)
        networks = [ip_network(proxy) for proxy in proxies]
        self.app: App = RequestMiddleware(
            inner, Metrics(self.registry), logger, Port.TENANTS, self.recorder.tracer, networks
        )

    @property
    def access_event(self) -> Mapping[str, Any]:
        (event,) = [event for event in self.events if event["event"] == "request.ended"]
        return event

    def count_requests(self, method: str, route: str, status: int) -> float | None:
        labels = {"port": "tenants", "method": method, "route": route, "status": str(status)}
        return self.registry.get_sample_value("gateway_http_requests_total", labels)


CRASH = "/things/{thing}", 500, "internal-error", "internal-error"


@pytest.mark.parametrize(
    ("method", "path", "route", "status", "outcome", "error"),
    [
        ("GET", "/things/one?key=hunter2", "/things/{thing}", 200, "answered", None),
        ("GET", "/things/missing", "/things/{thing}", 404, "not-found", None),
        *(("GET", f"/things/{crash}", *CRASH) for crash in ("crash", "unmapped", "framework")),
        ("GET", "/things/forbidden", "/things/{thing}", 403, "forbidden", None),
        ("GET", "/nowhere", "unmatched", 404, "not-found", None),
        ("DELETE", "/things/one", "unmatched", 405, "method-not-allowed", None),
        ("GET", "/things/left", "/things/{thing}", 499, "client-disconnected", None),
        ("GET", "/things/transfer-aborted", "/things/{thing}", 200, "transfer-aborted", "transfer-aborted"),
        ("GET", "/things/client-too-slow", "/things/{thing}", 200, "client-too-slow", None),
    ],
)
async def test_every_request_is_counted_logged_and_recorded_once(
    method: str, path: str, route: str, status: int, outcome: str, error: str | None
) -> None:
    observed = ObservedApp()
    response = await call_app(observed.app, method, path, headers={"Authorization": "Bearer hunter2"})
    event, span = observed.access_event, observed.recorder.span
    tenant = None if route == "unmatched" else "demo"
    fields = ("method", "path", "route", "tenant", "status", "outcome")
    expected = [method, path.partition("?")[0], route, tenant, status, outcome]
    assert [event[field] for field in fields] == expected
    if response:
        assert (response.status, response.headers["x-request-id"]) == (status, event["request_id"])
        assert b"hunter2" not in response.body
    assert "hunter2" not in str((event, span))
    causes = [event for event in observed.events if event["event"] == "request.error"]
    assert len(causes) == (status == 500)
    assert all("hunter2" in str(cause["exc_info"]) for cause in causes)
    assert observed.count_requests(method, route, status) == 1
    names = ("http.response.status_code", "gateway.outcome", "gateway.tenant", "error.type")
    assert [span.attributes.get(name) for name in names] == [status if response else None, outcome, tenant, error]
    assert (span.is_error, span.status_message, span.event_count) == (error is not None, "", 0)
    assert (span.name, span.kind) == (method if tenant is None else f"{method} {route}", "server")
    assert event["trace_id"] == span.trace_id


async def test_texts_of_clients_are_cut_and_no_span_names() -> None:
    observed = ObservedApp()
    await call_app(observed.app, "GET", "/\n{}\x1b" + "x" * 470 + ADMIN_TOKEN)
    assert observed.access_event["path"].startswith("/%0A%7B%7D%1Bxxx")
    assert len(observed.access_event["path"]) <= 2_000  # the log cuts it once it is redacted
    await call_app(observed.app, "BREW", "/things/one")
    unmatched, unknown = observed.recorder.spans
    assert len(unmatched.attributes["url.path"]) <= 500
    assert ADMIN_TOKEN[:19] not in str(unmatched)
    assert unknown.name.split()[0] == "HTTP"
    assert unknown.attributes["http.request.method"] == "_OTHER"


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("192.0.2.1, 203.0.113.9,10.1.2.3", "203.0.113.9"),
        ("10.1.2.3, 127.0.0.1", "10.1.2.3"),
        ("203.0.113.9:4711, [fd00::1]:80", "203.0.113.9"),
        ("192.0.2.1, 2001:db8::1", "2001:db8::1"),
        ("", "127.0.0.1"),
        ("192.0.2.1, unknown", "unknown"),
        ("\x1b[31m" + "x" * 100, "\x1b[31m" + "x" * 40),
    ],
)
async def test_client_behind_trusted_proxies(forwarded: str, client: str) -> None:
    for proxies in (["127.0.0.1", "10.0.0.0/8", "fd00::/8"], ["10.0.0.0/8"], []):
        observed = ObservedApp(None, None, *proxies)
        await call_app(observed.app, headers={"X-Forwarded-For": forwarded})
        assert observed.access_event["client"] == (client if "127.0.0.1" in proxies else "127.0.0.1")


async def test_sampling_follows_the_parent() -> None:
    for share, sampled in ((0.0, "01"), (1.0, "00")):
        observed = ObservedApp(recorder=SpanRecorder(share=share))
        await call_app(observed.app, headers={"traceparent": f"00-{TRACE}-{SPAN}-{sampled}"})
        assert observed.access_event["trace_id"] == TRACE
        parents = [(span.trace_id, span.parent_id) for span in observed.recorder.spans]
        assert parents == ([(TRACE, SPAN)] if sampled == "01" else [])


async def test_requests_do_not_share_state() -> None:
    # The server may reuse one scope object.
    observed = ObservedApp()
    shared: dict[str, Any] = {"pool": 1}
    for path in ("/things/one", "/nowhere"):
        await observed.app(make_http_scope("GET", path) | {"state": shared}, make_receive([]), AsyncMock())
    assert [event.get("tenant") for event in observed.events if event["event"] == "request.ended"] == ["demo", None]
    assert shared == {"pool": 1}


async def test_error_outside_the_handlers_is_a_problem() -> None:
    observed = ObservedApp(AsyncMock(side_effect=ZeroDivisionError))
    response = await call_app(observed.app)
    assert response
    assert (response.status, response.headers["content-type"]) == (500, "application/problem+json")
    crash, event = observed.events
    assert (crash["event"], crash["exc_info"]) == ("request.error", True)
    assert response.json()["instance"] == crash["request_id"] == event["request_id"]
    assert (event["status"], event["outcome"]) == (500, "internal-error")


async def test_error_within_a_response_leaves_it_unfinished() -> None:
    async def torn(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ZeroDivisionError

    observed, send = ObservedApp(torn), AsyncMock()
    await observed.app(make_http_scope(), make_receive([]), send)
    assert [call.args[0].get("more_body") for call in send.await_args_list] == [None, True]
    assert [event["event"] for event in observed.events] == ["request.error", "request.ended"]
    assert (observed.access_event["status"], observed.access_event["outcome"]) == (200, "internal-error")


def test_refused_requests_are_logged_once_per_address_and_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    observed = ObservedApp()
    middleware = cast("RequestMiddleware", observed.app)
    for client in ("192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.1"):
        middleware.refuse(400, "Nonsense.", client)
    assert [event["client"] for event in observed.events] == ["192.0.2.1", "192.0.2.2"]
    monkeypatch.setattr(asgi, "REFUSAL_LOG_SECONDS", 0)
    middleware.refuse(400, "Nonsense.", "192.0.2.1")
    assert len(observed.events) == 3
    for number in range(1_500):
        middleware.refuse(400, "Nonsense.", str(number))
    assert len(middleware._refusal_logged_at) <= 1_000
    assert observed.count_requests("other", "unmatched", 400) == 1_505


SAMPLED = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize("headers", [[f"00-{TRACE}-{SPAN}-1"], [f"00-{'0' * 32}-{SPAN}-01"], [SAMPLED, SAMPLED]])
def test_invalid_parent_starts_a_trace(headers: list[str]) -> None:
    recorder = SpanRecorder()
    scope = make_http_scope(headers={"host": "host:port"})
    scope["headers"] += [(b"traceparent", header.encode()) for header in headers]
    with tracing.start_request_span(recorder.tracer, scope):
        pass
    assert recorder.span.parent_id == ""
    assert recorder.span.trace_id != TRACE
    assert "server.address" not in recorder.span.attributes


async def test_without_a_collector_nothing_is_passed_on() -> None:
    with tracing.start_request_span(NOOP_TRACER, make_http_scope(headers={"traceparent": SAMPLED})) as span:
        assert tracing.trace_id_of(span) == TRACE
        assert tracing.trace_headers() == {}


def test_probes_are_not_recorded() -> None:
    recorder = SpanRecorder()
    for path in ("/healthz", "/readyz", "/metrics"):
        with tracing.start_request_span(recorder.tracer, make_http_scope(path=path, headers={"traceparent": SAMPLED})):
            pass
    assert recorder.spans == []


@pytest.fixture
def collector() -> Iterator[TraceCollector]:
    with run_collector() as trace_collector:
        yield trace_collector


def record_requests(tracer: Tracer, times: int = 1) -> None:
    for _ in range(times):
        with tracing.start_request_span(tracer, make_http_scope(path="/x")) as span:
            tracing.record_request_end(span, "GET", 200, route="/x", outcome="answered", tenant=None)


async def export_requests(url: str, times: int = 1) -> None:
    async with open_tracer(url, 1.0, str) as tracer:
        record_requests(tracer, times)


async def test_only_the_process_and_the_credentials_come_from_the_environment(
    collector: TraceCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreachable = f"http://127.0.0.1:{reserve_port()}"
    for name, value in {
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=staging,service.version=of-the-platform",
        "OTEL_SERVICE_NAME": "gateway-of-ours",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-key=let-me-in",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": unreachable,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.000001",
        "OTEL_TRACES_SAMPLER": "always_off",
        "OTEL_BSP_MAX_QUEUE_SIZE": "0",
        "http_proxy": unreachable,
        "no_proxy": "",
    }.items():
        monkeypatch.setenv(name, value)
    await export_requests(collector.url)
    (span,) = collector.spans
    assert span.attributes["url.path"] == "/x"
    names = ("deployment.environment.name", "service.version", "service.name")
    assert [span.resource[name] for name in names] == ["staging", "of-the-platform", "gateway-of-ours"]
    await export_requests(f"{collector.url}/otlp/of/ours")
    assert [path for path, _ in collector.requests] == ["/v1/traces", "/otlp/of/ours"]
    headers = collector.requests[0][1]
    assert (headers["x-key"], headers["content-encoding"]) == ("let-me-in", "gzip")


async def test_unavailable_collector_does_not_delay_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_otel, "FLUSH_SECONDS", 0.05)
    with capture_logs() as events:
        await export_requests(f"http://127.0.0.1:{reserve_port()}", times=tracing_otel.MAX_BATCH_SIZE * 3)
    assert "tracing.flush_timeout" in [event["event"] for event in events]


async def test_refused_spans_are_lost_and_logged_once(
    collector: TraceCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing_otel, "EXPORT_INTERVAL_SECONDS", 0.01)
    collector.status = 401
    with capture_logs() as events:
        async with open_tracer(collector.url, 1.0, str) as tracer:
            for count in (1, 2):
                record_requests(tracer)
                await asyncio.to_thread(wait_until, partial(collector.has_received, count), "a try")
    assert [event["event"] for event in events if "401" in event.get("detail", "")] == ["tracing.export_failed"]


async def test_full_queue_drops_spans(collector: TraceCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_otel, "MAX_QUEUE_SIZE", 8)
    monkeypatch.setattr(tracing_otel, "MAX_BATCH_SIZE", 8)
    collector.status = 503
    with capture_logs() as events:
        async with open_tracer(collector.url, 1.0, str) as tracer:
            record_requests(tracer, times=100)
            collector.status = 200
    assert 8 <= len(collector.spans) < 100
    assert len([event for event in events if "full" in event.get("detail", "")]) == 1


_LIMITS = (Limit(Window.DAY, tasks=9), Limit(Window.MONTH, money_fen=900))
REGISTRY = Registry(
    version=1,
    tenants={
        "shop": Tenant(1, "shop", ("main",), TenantPolicy(_LIMITS, max_active=3), kinds=(Kind.UPSCALE, Kind.SEAMLESS))
    },
    accounts={"main": Account(2, "main", b"encrypted")},
)


def read_sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(metrics.render()):
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


def test_series_of_changed_and_recreated_tenants(metrics: Metrics) -> None:
    def read(tenant: Tenant) -> list[float | None]:
        registry = Registry(tenants={tenant.name: tenant})
        metrics.label_names.read_registry = lambda: registry
        metrics.label_names.refresh()
        policies = ("day-tasks", "max-active")
        return [read_sample(metrics, "quota_denials_total", tenant="shop", policy=policy) for policy in policies]

    assert read(Tenant(3, "shop", ())) == [None, None]
    limited = Tenant(3, "shop", (), TenantPolicy((Limit(Window.DAY, tasks=5),)))
    assert read(limited) == [0, None]
    metrics.quota_denials.labels("shop", "day-tasks").inc()
    assert read(replace(limited, note="changed")) == [1, None]
    assert read(Tenant(4, "shop", (), TenantPolicy(max_active=1))) == [1, 0]


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
    FormattedCounter("gateway_b", documentation, ("two", "one"), registry=registry).labels(label, "x").inc(abs(number))
    gauges = FormattedGauges("gateway_c", documentation, labels=("two", "one"))
    gauges.add_metric((label, "x"), number)
    collector: Any = type("Gauges", (), {"collect": lambda _: [gauges]})()
    registry.register(collector)
    assert "".join(format_exposition(registry)).encode() == generate_latest(registry)


def test_whole_scrape(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.label_names.read_registry = lambda: REGISTRY
    metrics.ledger_collector.set_snapshot(
        MetricsSnapshot(quotas=[QuotaSample("shop", "day-money", "yuan", 1.5, 0.5, 10)])
    )
    metrics.label_names.refresh()
    families = list(metrics.registry.collect())
    monkeypatch.setattr(metrics.registry, "collect", lambda: iter(families))
    body = metrics.render()
    assert body.encode() == generate_latest(metrics.registry)
    assert "gateway_quota_used" in body
    assert "_created" not in body  # they would add half to the size of a scrape
