"""A collector of traces and the recorded spans."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.telemetry.redaction import Redactor
from service.telemetry.tracing_otel import create_provider, get_tracer

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
"""Ids of a client."""
_KINDS = {1: "internal", 2: "server", 3: "client"}


@dataclass(frozen=True)
class RecordedSpan:
    """A span; ids are hexadecimal, `links` are pairs of trace id and span id."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    trace_state: str
    attributes: Mapping[str, Any]
    links: Sequence[tuple[str, str]]
    is_error: bool
    status_message: str
    event_count: int
    resource: Mapping[str, Any]

    @property
    def traceparent(self) -> str:
        """The span as `traceparent`, without flags."""
        return f"00-{self.trace_id}-{self.span_id}"


def read_spans(request: ExportTraceServiceRequest) -> Iterator[RecordedSpan]:
    for resource_spans in request.resource_spans:
        for span in (span for scope in resource_spans.scope_spans for span in scope.spans):
            yield RecordedSpan(
                name=span.name,
                kind=_KINDS[span.kind],
                trace_id=span.trace_id.hex(),
                span_id=span.span_id.hex(),
                parent_id=span.parent_span_id.hex(),
                trace_state=span.trace_state,
                attributes=_read_attributes(span.attributes),
                links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
                is_error=span.status.code == 2,
                status_message=span.status.message,
                event_count=len(span.events),
                resource=_read_attributes(resource_spans.resource.attributes),
            )


def _read_attributes(attributes: Sequence[KeyValue]) -> dict[str, Any]:
    return {item.key: getattr(item.value, str(item.value.WhichOneof("value"))) for item in attributes}


class SpanRecorder:
    def __init__(self, share: float = 1.0, secrets: Sequence[str] = ()) -> None:
        self._exporter = InMemorySpanExporter()
        provider = create_provider(share, Redactor(secrets).redact_text)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = get_tracer(provider)

    @property
    def spans(self) -> list[RecordedSpan]:
        """The ended spans, in the order of their end."""
        return list(read_spans(encode_spans(self._exporter.get_finished_spans())))

    @property
    def span(self) -> RecordedSpan:
        (span,) = self.spans
        return span


@dataclass
class TraceCollector:
    url: str = ""
    status: int = 200
    bodies: list[bytes] = field(default_factory=list)
    requests: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)

    @property
    def spans(self) -> list[RecordedSpan]:
        return [span for body in list(self.bodies) for span in read_spans(ExportTraceServiceRequest.FromString(body))]

    def has_received(self, times: int) -> bool:
        return len(self.requests) >= times

    def find_spans(self, name: str) -> list[RecordedSpan]:
        return [span for span in self.spans if span.name == name]

    def get_span(self, name: str) -> RecordedSpan:
        (span,) = self.find_spans(name)
        return span


@contextmanager
def run_collector() -> Iterator[TraceCollector]:
    collector = TraceCollector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            if self.headers["Content-Encoding"] == "gzip":
                body = gzip.decompress(body)
            if collector.status == 200:
                collector.bodies.append(body)
            self.send_response(collector.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.block_on_close = False
        collector.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield collector
        finally:
            server.shutdown()
