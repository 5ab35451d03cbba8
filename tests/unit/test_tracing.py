"""Spans of requests by OpenTelemetry's semantic conventions, and their export."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import structlog
from litestar import Litestar, Request, Response, get
from litestar.params import FromPath
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from service.api.asgi import RequestMiddleware
from service.api.errors import OUTCOME, ClientDisconnected, exception_handlers
from service.container import open_tracer
from service.domain.errors import LedgerUnavailable, NotFound
from service.telemetry import tracing, tracing_otel
from service.telemetry.metrics import Metrics, Port
from service.telemetry.tracing import NOOP_TRACER
from tests.support.traces import SPAN, TRACE, SpanRecorder, TraceCollector, run_collector, wait_until
from tests.unit.asgi_client import AsgiResponse, call_app, make_http_scope

SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"
ADMIN_TOKEN = "the-token-of-the-operators"


@get("/things/{thing:str}")
async def thing(request: Request[Any, Any, Any], thing: FromPath[str]) -> Response[dict[str, str]]:
    request.scope["state"]["tenant"] = "demo"
    match thing:
        case "missing":
            raise NotFound("No such thing.")
        case "away":
            raise LedgerUnavailable("Not now.", retry_after=1)
        case "crash":
            raise ZeroDivisionError("with private words")
        case "left":
            raise ClientDisconnected
        case "broken":
            request.scope["state"][OUTCOME] = "transfer-aborted"
        case "slow":
            request.scope["state"][OUTCOME] = "client-too-slow"
    return Response(dict(structlog.contextvars.get_contextvars()))


@get(["/healthz", "/readyz", "/metrics"])
async def probe() -> None:
    """Respond with an empty body."""


async def send_request(
    tracer: Tracer, path: str, method: str = "GET", headers: Mapping[str, str] | None = None
) -> AsgiResponse | None:
    def silent(_logger: Any, _method: str, _event: Any) -> Any:
        raise structlog.DropEvent

    logger = structlog.wrap_logger(None, processors=[silent], wrapper_class=structlog.make_filtering_bound_logger(0))
    handlers: dict[Any, Any] = dict(exception_handlers(logger))
    inner = Litestar([thing, probe], exception_handlers=handlers, openapi_config=None, logging_config=None)
    app = RequestMiddleware(inner, Metrics(CollectorRegistry()), logger, Port.TENANTS, tracer)
    return await call_app(app, method, path, headers=headers)


async def read_logged_trace(tracer: Tracer, **headers: str) -> str | None:
    """Return the id of the trace that log lines have during a request."""
    response = await send_request(tracer, "/things/one", headers=headers)
    assert response is not None
    trace: str | None = response.json().get("trace_id")
    return trace


async def test_request_span() -> None:
    recorder = SpanRecorder()
    headers = {"Host": "gateway.internal:8080", "User-Agent": "curl/9", "Authorization": "Bearer igw_x"}
    await send_request(recorder.tracer, "/things/one?key=hunter2", headers=headers)
    span = recorder.span
    assert (span.name, span.kind, span.parent_id, span.is_error) == ("GET /things/{thing}", "server", "", False)
    expected = {
        "http.request.method": "GET",
        "http.route": "/things/{thing}",
        "http.response.status_code": 200,
        "url.path": "/things/one",
        "server.address": "gateway.internal",
        "server.port": 8080,
        "gateway.tenant": "demo",
        "gateway.outcome": "answered",
    }
    assert expected.items() <= span.attributes.items()
    assert not [secret for secret in ("igw_x", "hunter2") if secret in str(span)]


@pytest.mark.parametrize(
    ("path", "status", "error", "outcome"),
    [
        ("/things/away", 503, "ledger-unavailable", "ledger-unavailable"),
        ("/things/crash", 500, "internal-error", "internal-error"),
        ("/things/left", None, None, "client-disconnected"),
        ("/things/broken", 200, "transfer-aborted", "transfer-aborted"),
        ("/things/slow", 200, None, "client-too-slow"),
    ],
)
async def test_span_status_by_outcome(path: str, status: int | None, error: str | None, outcome: str) -> None:
    recorder = SpanRecorder()
    await send_request(recorder.tracer, path)
    span = recorder.span
    names = ("http.response.status_code", "error.type", "gateway.outcome")
    assert [span.attributes.get(name) for name in names] == [status, error, outcome]
    assert (span.is_error, span.status_message, span.event_count) == (error is not None, "", 0)


async def test_texts_of_clients_are_no_span_names_and_are_cut() -> None:
    recorder = SpanRecorder(secrets=[ADMIN_TOKEN])
    await send_request(recorder.tracer, "/" + "x" * 480 + ADMIN_TOKEN)
    await send_request(recorder.tracer, "/things/one", "BREW")
    unmatched, unknown = recorder.spans
    assert (unmatched.name, unmatched.attributes.get("http.route")) == ("GET", None)
    assert len(unmatched.attributes["url.path"]) <= 500
    assert ADMIN_TOKEN[:19] not in str(unmatched)
    assert unknown.name.split()[0] == "HTTP"
    assert unknown.attributes["http.request.method"] == "_OTHER"


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


async def test_sampling_follows_the_parent() -> None:
    some, none = SpanRecorder(share=0.0), SpanRecorder(share=1.0)
    assert await read_logged_trace(some.tracer, traceparent=SAMPLED) == TRACE
    assert await read_logged_trace(none.tracer, traceparent=UNSAMPLED) == TRACE
    assert (len(some.spans), len(none.spans)) == (1, 0)
    assert (some.span.trace_id, some.span.parent_id) == (TRACE, SPAN)


async def test_without_a_collector_the_trace_is_logged_and_not_passed_on() -> None:
    assert await read_logged_trace(NOOP_TRACER, traceparent=UNSAMPLED) == TRACE
    assert await read_logged_trace(NOOP_TRACER) is None
    with tracing.start_request_span(NOOP_TRACER, make_http_scope(headers={"traceparent": SAMPLED})):
        assert tracing.trace_headers() == {}
    async with open_tracer(None, 1.0, str) as tracer:
        assert tracer is NOOP_TRACER


async def test_probes_are_not_recorded() -> None:
    recorder = SpanRecorder()
    for path in ("/healthz", "/readyz", "/metrics"):
        await send_request(recorder.tracer, path, headers={"traceparent": SAMPLED})
    assert recorder.spans == []


@pytest.fixture
def collector() -> Iterator[TraceCollector]:
    with run_collector() as trace_collector:
        yield trace_collector


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses connections, and that no other process can open."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def record_requests(tracer: Tracer, times: int = 1) -> None:
    for _ in range(times):
        with tracing.start_request_span(tracer, make_http_scope(path="/x")) as span:
            tracing.record_request_end(span, "GET", 200, route="/x", outcome="answered", tenant=None)


async def export_requests(url: str, times: int = 1) -> None:
    """Record requests and shut the exporter down."""
    async with open_tracer(url, 1.0, str) as tracer:
        record_requests(tracer, times)


async def test_only_the_process_and_the_credentials_come_from_the_environment(
    collector: TraceCollector, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreachable = f"http://127.0.0.1:{closed_port}"
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


async def test_unavailable_collector_does_not_delay_the_end(closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_otel, "FLUSH_SECONDS", 0.05)
    with capture_logs() as events:
        await export_requests(f"http://127.0.0.1:{closed_port}", times=tracing_otel.MAX_BATCH_SIZE * 3)
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
