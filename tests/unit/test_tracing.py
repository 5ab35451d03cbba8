"""Spans of requests by OpenTelemetry's semantic conventions, and their export."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial

import pytest
from opentelemetry.trace import Tracer
from structlog.testing import capture_logs

from service.container import open_tracer
from service.telemetry import tracing, tracing_otel
from service.telemetry.tracing import NOOP_TRACER
from tests.support.network import reserve_port
from tests.support.traces import SPAN, TRACE, SpanRecorder, TraceCollector, run_collector, wait_until
from tests.unit.asgi_client import make_http_scope

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
    """Record requests and shut the exporter down."""
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
