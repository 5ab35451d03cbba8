"""A collector of traces, and the recorded spans as it gets them."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.telemetry.redaction import Redactor
from service.telemetry.tracing_otel import OtelTracer, provider

SECONDS = 20.0
_KINDS = {1: "internal", 2: "server", 3: "client"}


@dataclass(frozen=True)
class Recorded:
    """A span; ids are hexadecimal, and `links` are the ids of traces and spans."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    state: str
    attributes: Mapping[str, Any]
    links: Sequence[tuple[str, str]]
    failed: bool
    said: str
    events: int
    resource: Mapping[str, Any]

    @property
    def context(self) -> str:
        """It as a `traceparent`, without the flags."""
        return f"00-{self.trace}-{self.id}"


def read(request: ExportTraceServiceRequest) -> Iterator[Recorded]:
    """The spans of a message."""
    for whose in request.resource_spans:
        resource = _plain(whose.resource.attributes)
        for scope in whose.scope_spans:
            for span in scope.spans:
                yield Recorded(
                    name=span.name,
                    kind=_KINDS[span.kind],
                    trace=span.trace_id.hex(),
                    id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    state=span.trace_state,
                    attributes=_plain(span.attributes),
                    links=[(each.trace_id.hex(), each.span_id.hex()) for each in span.links],
                    failed=span.status.code == 2,
                    said=span.status.message,
                    events=len(span.events),
                    resource=resource,
                )


def _plain(attributes: Sequence[KeyValue]) -> dict[str, Any]:
    return {each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in attributes}


class Recorder:
    """A tracer with what it recorded."""

    def __init__(self, share: float = 1.0, secrets: Sequence[str] = ()) -> None:
        self._kept = InMemorySpanExporter()
        made: TracerProvider = provider(share)
        made.add_span_processor(SimpleSpanProcessor(self._kept))
        self.tracer = OtelTracer(made, Redactor(secrets).text)

    @property
    def spans(self) -> list[Recorded]:
        """What has ended, in the order of its end."""
        return list(read(encode_spans(self._kept.get_finished_spans())))

    @property
    def span(self) -> Recorded:
        """The only one."""
        (span,) = self.spans
        return span


@dataclass
class Collector:
    """A server that collects traces, and answers with `status`."""

    url: str = ""
    status: int = 200
    bodies: list[bytes] = field(default_factory=list)
    requests: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)

    @property
    def spans(self) -> list[Recorded]:
        """All spans that came."""
        return [span for body in list(self.bodies) for span in read(ExportTraceServiceRequest.FromString(body))]

    def tried(self, times: int) -> bool:
        """Whether it was tried so often to send something."""
        return len(self.requests) >= times

    def one(self, name: str) -> Recorded:
        """The only span of a name."""
        (span,) = self.all(name)
        return span

    def all(self, name: str) -> list[Recorded]:
        """The spans of a name."""
        return [span for span in self.spans if span.name == name]


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait in a thread for a condition."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about"
        time.sleep(0.01)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on this machine, in a thread of its own."""
    collector = Collector()

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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    collector.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
