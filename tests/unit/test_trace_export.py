"""Export of traces to a collector."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from functools import partial

import pytest
from opentelemetry.trace import Tracer
from structlog.testing import capture_logs

from service import __version__
from service.container import open_tracer
from service.telemetry import tracing, tracing_otel
from service.telemetry.tracing import NOOP_TRACER
from tests.support.network import reserve_port
from tests.support.traces import TraceCollector, run_collector, wait_until
from tests.unit.asgi_client import make_http_scope


@pytest.fixture
def collector() -> Iterator[TraceCollector]:
    with run_collector() as trace_collector:
        yield trace_collector


def record_requests(tracer: Tracer, times: int = 1) -> None:
    for _ in range(times):
        with tracing.start_request_span(tracer, make_http_scope(path="/x")) as span:
            tracing.record_request_end(span, "GET", 200, route="/x", outcome="answered", tenant=None)


async def export_requests(url: str, share: float = 1.0, times: int = 1) -> None:
    """Record requests and shut the exporter down."""
    async with open_tracer(url, share, str) as tracer:
        record_requests(tracer, times)


async def test_no_collector() -> None:
    async with open_tracer(None, 1.0, str) as tracer:
        assert tracer is NOOP_TRACER


async def test_spans_are_flushed_at_the_end(collector: TraceCollector) -> None:
    await export_requests(collector.url, times=3)
    assert [span.name for span in collector.spans] == ["GET /x"] * 3
    ((path, headers),) = collector.requests
    assert (path, headers["content-type"], headers["content-encoding"]) == (
        "/v1/traces",
        "application/x-protobuf",
        "gzip",
    )
    resources = [span.resource for span in collector.spans]
    assert resources[0]["service.name"] == "imaging-gateway"
    assert resources[0]["service.version"] == __version__
    await export_requests(collector.url)
    assert len({span.resource["service.instance.id"] for span in collector.spans}) == 2


async def test_spans_are_exported_periodically(collector: TraceCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_otel, "EXPORT_INTERVAL_SECONDS", 0.01)
    async with open_tracer(collector.url, 1.0, str) as tracer:
        record_requests(tracer)
        await asyncio.to_thread(wait_until, lambda: bool(collector.spans), "a span")


async def test_collector_path(collector: TraceCollector) -> None:
    await export_requests(f"{collector.url}/otlp/of/ours")
    assert [path for path, _ in collector.requests] == ["/otlp/of/ours"]


async def test_sampling_ratio(collector: TraceCollector) -> None:
    await export_requests(collector.url, share=0.0)
    assert collector.requests == []


async def test_otel_environment(collector: TraceCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = f"http://127.0.0.1:{reserve_port()}"
    for name, value in {
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=staging,service.version=of-the-platform",
        "OTEL_SERVICE_NAME": "gateway-of-ours",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-key=let-me-in",
        "OTEL_EXPORTER_OTLP_ENDPOINT": unreachable,
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": unreachable,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.000001",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        "OTEL_TRACES_SAMPLER": "always_off",
        "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "0",
        "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT": "1",
        "OTEL_BSP_MAX_QUEUE_SIZE": "0",
        "HTTP_PROXY": unreachable,
        "http_proxy": unreachable,
        "ALL_PROXY": unreachable,
        "NO_PROXY": "",
        "no_proxy": "",
    }.items():
        monkeypatch.setenv(name, value)
    await export_requests(collector.url)
    (span,) = collector.spans
    assert span.attributes["url.path"] == "/x"
    assert span.resource["deployment.environment.name"] == "staging"
    assert span.resource["service.version"] == "of-the-platform"
    assert span.resource["service.name"] == "gateway-of-ours"
    ((_, headers),) = collector.requests
    assert (headers["x-key"], headers["content-encoding"]) == ("let-me-in", "gzip")


async def test_unavailable_collector_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_otel, "EXPORT_INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(tracing_otel, "FLUSH_SECONDS", 0.3)
    with capture_logs() as events:
        async with open_tracer(f"http://127.0.0.1:{reserve_port()}", 1.0, str) as tracer:
            record_requests(tracer, times=tracing_otel.MAX_BATCH_SIZE * 3)
            await asyncio.to_thread(wait_until, lambda: bool(events), "a line in the log")
            begun = time.monotonic()
        assert time.monotonic() - begun < 3
    troubles = [event for event in events if event["event"] == "tracing.export_failed"]
    assert troubles
    assert all(event["log_level"] == "warning" for event in events)
    templates = {trouble["detail"].split()[0] for trouble in troubles}
    assert len(templates) == len(troubles)


async def test_silent_collector_delays_the_end_by_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_otel, "FLUSH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, capture_logs() as events:
        begun = time.monotonic()
        await export_requests(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert 0.2 <= time.monotonic() - begun < 3
    assert "tracing.flush_timeout" in [event["event"] for event in events]


async def test_refused_spans_are_lost_and_logged_once(
    collector: TraceCollector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing_otel, "EXPORT_INTERVAL_SECONDS", 0.01)
    collector.status = 401
    with capture_logs() as events:
        async with open_tracer(collector.url, 1.0, str) as tracer:
            for count in (1, 2, 3):
                record_requests(tracer)
                await asyncio.to_thread(wait_until, partial(collector.has_received, count), "a try")
    (event,) = events
    assert "401" in event["detail"]
    assert caplog.records == []


async def test_full_queue_drops_spans(collector: TraceCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_otel, "MAX_QUEUE_SIZE", 8)
    monkeypatch.setattr(tracing_otel, "MAX_BATCH_SIZE", 8)
    collector.status = 503
    with capture_logs() as events:
        async with open_tracer(collector.url, 1.0, str) as tracer:
            record_requests(tracer, times=100)
            collector.status = 200
    assert 8 <= len(collector.spans) < 100
    full = [event for event in events if "full" in event.get("detail", "")]
    assert len(full) == 1
