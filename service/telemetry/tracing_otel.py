"""Traces with OpenTelemetry."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from types import MappingProxyType, TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit
from uuid import uuid4

import requests
import structlog
from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, SamplingResult, TraceIdRatioBased
from opentelemetry.semconv.attributes import client_attributes as client
from opentelemetry.semconv.attributes import db_attributes as db
from opentelemetry.semconv.attributes import error_attributes as errors
from opentelemetry.semconv.attributes import http_attributes as http
from opentelemetry.semconv.attributes import network_attributes as network
from opentelemetry.semconv.attributes import server_attributes as server
from opentelemetry.semconv.attributes import url_attributes as addresses
from opentelemetry.semconv.attributes import user_agent_attributes as agent
from opentelemetry.semconv.attributes.service_attributes import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION
from opentelemetry.semconv.schemas import Schemas
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, TraceState
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from service import __version__
from service.telemetry.logging import ANSWERED
from service.telemetry.tracing import THEIR_DOING, UNRECORDED, Untraced, trace_id

OUTCOME = "gateway.outcome"


TENANT = "gateway.tenant"


RESERVATION = "gateway.reservation"


REDACTED_PATH = "/REDACTED"


PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
"""Machines ask for them every few seconds: they would outnumber everything else."""


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})


_OTHER = "_OTHER"


_PORTS = {"http": 80, "https": 443}


_W3C = TraceContextTextMapPropagator()


class OtelTracer:
    """Records on a provider of its own: nothing of OpenTelemetry that is global is set or asked."""

    def __init__(self, provider: trace.TracerProvider, clean: Callable[[str], str]) -> None:
        self._tracer = provider.get_tracer("imaging-gateway", __version__, schema_url=Schemas.V1_33_0.value)
        self._clean = clean

    def request(self, scope: Mapping[str, Any]) -> _Request | Untraced:
        """Serve a request: in the trace it says it belongs to, else in a new one."""
        given = trace_id(scope["headers"])
        if scope["path"] in PROBES:
            return Untraced(given)
        method = scope["method"] if scope["method"] in _METHODS else "HTTP"
        # Not in the current context: a server may handle one request out of another's.
        context = _W3C.extract(_carrier(scope), Context()) if given else Context()
        span = self._tracer.start_span(method, context, SpanKind.SERVER)
        if span.is_recording():
            span.set_attributes(dict(self._told(scope)))
        return _Request(span, method, given)

    def follow_up(self, what: str, cause: str | None, reservation: str) -> _Work | Untraced:
        """Do what follows from other work."""
        if cause is None:
            return UNRECORDED
        caused = trace.get_current_span(_W3C.extract({"traceparent": cause}, Context())).get_span_context()
        if not caused.is_valid:
            return UNRECORDED
        attributes = {RESERVATION: reservation}
        return _Work(self._tracer.start_span(what, Context(), SpanKind.INTERNAL, attributes, [Link(caused)]))

    def call(self, method: str, url: str, *, private: bool = True, resent: int = 0) -> _Call | Untraced:
        """Call another server. The query of its address is never recorded."""
        if not _recorded():
            return UNRECORDED
        scheme, authority, path = _parts(url)
        host, port = _host(authority, scheme)
        path = REDACTED_PATH if private else self._clean(path)
        attributes: dict[str, str | int] = {
            http.HTTP_REQUEST_METHOD: method,
            server.SERVER_ADDRESS: self._clean(host),
            server.SERVER_PORT: port,
            addresses.URL_FULL: self._clean(f"{scheme}://{authority}{path}"),
        }
        if resent:
            attributes[http.HTTP_REQUEST_RESEND_COUNT] = resent
        name = method if private else f"{method} {path}"
        return _Call(self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes))

    def store(self, operation: str, *, script: str | None = None, batch: int = 1) -> _Span | Untraced:
        """Have the store do something; a script is a stored procedure in the words of the conventions."""
        if not _recorded():
            return UNRECORDED
        attributes: dict[str, str | int] = {db.DB_SYSTEM_NAME: "redis", db.DB_OPERATION_NAME: operation}
        if script:
            attributes[db.DB_STORED_PROCEDURE_NAME] = script
        if batch > 1:
            attributes[db.DB_OPERATION_BATCH_SIZE] = batch
        name = f"{operation} {script}" if script else operation
        return _Span(self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes))

    def context(self) -> str | None:
        """The context of what is done now, as a `traceparent`."""
        return _headers_of(trace.get_current_span())["traceparent"] if _recorded() else None

    def _told(self, scope: Mapping[str, Any]) -> Iterator[tuple[str, str | int]]:
        """What is known of a request when it comes."""
        method, clean = scope["method"], self._clean
        yield http.HTTP_REQUEST_METHOD, method if method in _METHODS else _OTHER
        if method not in _METHODS:
            yield http.HTTP_REQUEST_METHOD_ORIGINAL, clean(method)
        yield addresses.URL_SCHEME, scope["scheme"]
        yield addresses.URL_PATH, clean(quote(scope["path"]))
        yield network.NETWORK_PROTOCOL_VERSION, scope["http_version"]
        if scope["client"]:
            yield client.CLIENT_ADDRESS, scope["client"][0]
        headers = dict(scope["headers"])
        if b"user-agent" in headers:
            yield agent.USER_AGENT_ORIGINAL, clean(headers[b"user-agent"].decode("latin-1"))
        host, port = _host(headers.get(b"host", b"").decode("latin-1"), scope["scheme"])
        if host:
            yield server.SERVER_ADDRESS, clean(host)
            yield server.SERVER_PORT, port


class _Span:
    """A span that is no parent of others."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._fail(kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}")
        self._span.end()

    def _fail(self, error_type: str) -> None:
        self._span.set_attribute(errors.ERROR_TYPE, error_type)
        self._span.set_status(StatusCode.ERROR)


class _Call(_Span):
    """A request to another server."""

    @property
    def context(self) -> Mapping[str, str]:
        """The headers that pass the trace on."""
        return _headers_of(self._span)

    def answered(self, status: int) -> None:
        """It was answered, if with an error."""
        self._span.set_attribute(http.HTTP_RESPONSE_STATUS_CODE, status)
        if status >= 400:
            self._fail(str(status))


class _Work(_Span):
    """A span that is the parent of what is done in its block."""

    def __enter__(self) -> Self:
        self._token = contexts.attach(trace.set_span_in_context(self._span, Context()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        contexts.detach(self._token)
        super().__exit__(kind, error, traceback)


class _Request(_Work):
    """A request that is served."""

    def __init__(self, span: Span, method: str, given: str | None) -> None:
        super().__init__(span)
        self._method = method
        self.trace_id = trace.format_trace_id(span.get_span_context().trace_id) if span.is_recording() else given

    def answered(self, status: int | None, *, route: str | None, outcome: str, tenant: str | None) -> None:
        """It has ended."""
        if not self._span.is_recording():
            return
        told: dict[str, str | int] = {OUTCOME: outcome}
        if route:
            told[http.HTTP_ROUTE] = route
            self._span.update_name(f"{self._method} {route}")
        if status:
            told[http.HTTP_RESPONSE_STATUS_CODE] = status
        if tenant:
            told[TENANT] = tenant
        self._span.set_attributes(told)
        error_type = _error_type(status, outcome)
        if error_type:
            self._fail(error_type)


def _error_type(status: int | None, outcome: str) -> str | None:
    """In which way a request failed on our side; None if it did not."""
    if status is None or 400 <= status < 500 or outcome.startswith(THEIR_DOING):
        return None
    if status >= 500:
        return str(status) if outcome == ANSWERED else outcome
    return None if outcome == ANSWERED else outcome  # it failed after it had begun to answer


def _recorded() -> bool:
    """Whether what is done now is recorded; its span may have ended meanwhile, as when a client has left."""
    return trace.get_current_span().get_span_context().trace_flags.sampled


def _headers_of(span: Span) -> Mapping[str, str]:
    headers: dict[str, str] = {}
    _W3C.inject(headers, trace.set_span_in_context(span, Context()))
    return MappingProxyType(headers)


def _carrier(scope: Mapping[str, Any]) -> Mapping[str, list[str]]:
    """The headers that tell of a trace."""
    carrier: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        if name in {b"traceparent", b"tracestate"}:
            carrier.setdefault(name.decode(), []).append(value.decode("latin-1"))
    return carrier


def _parts(url: str) -> tuple[str, str, str]:
    """Scheme, host with port, and path of what should be an address, without what identifies somebody."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("?")[0].partition("#")[0].partition("/")
    return scheme, authority.rpartition("@")[2], slash + path


def _host(authority: str, scheme: str) -> tuple[str, int]:
    """The name of a server and its port; the name is empty if what is given is none."""
    try:
        parts = urlsplit(f"//{authority}")
        return parts.hostname or "", parts.port or _PORTS.get(scheme, 0)
    except ValueError:
        return "", 0


_log = structlog.get_logger(__name__)


SEND_SECONDS = 5.0
"""How long it is tried to send a batch."""


FLUSH_SECONDS = 5.0
"""How long the end of the process waits for what was recorded last to be sent."""


EVERY_SECONDS = 2.0


SAID_AGAIN_SECONDS = 600.0


QUEUED, BATCH = 4_096, 512


LONGEST_VALUE = 500


_PATH = "/v1/traces"


class Share(TraceIdRatioBased):
    """Chooses, of what no client traces, a share of the requests, and with them whatever follows from those."""

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """What is linked was chosen with its cause."""
        if links:
            return ALWAYS_ON.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        return super().should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)


def provider(share: float) -> TracerProvider:
    """What spans are made with.

    OpenTelemetry reads some dozens of environment variables by itself. What is recorded, how much of it, and where it
    is sent is up to the gateway's own settings, so all of these are given. Left to the environment is what describes
    the process (`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SERVICE_NAME`), since platforms set that; how to be let in by the
    collector (`OTEL_EXPORTER_OTLP_HEADERS`, `..._CERTIFICATE`, `..._CLIENT_KEY`, `..._CLIENT_CERTIFICATE`), since these
    are the names under which such secrets are handed out; and `OTEL_SDK_DISABLED`, which turns all of it off.
    """
    own = {SERVICE_NAME: "imaging-gateway", SERVICE_VERSION: __version__, SERVICE_INSTANCE_ID: str(uuid4())}
    return TracerProvider(
        sampler=ParentBased(Share(share)),
        resource=Resource.create(own | dict(OTELResourceDetector().detect().attributes)),
        shutdown_on_exit=False,
        span_limits=SpanLimits(
            max_attributes=32,
            max_events=0,
            max_links=1,
            max_span_attributes=32,
            max_event_attributes=0,
            max_link_attributes=0,
            max_attribute_length=LONGEST_VALUE,
            max_span_attribute_length=LONGEST_VALUE,
        ),
    )


@asynccontextmanager
async def exporting(url: str, share: float, clean: Callable[[str], str]) -> AsyncIterator[OtelTracer]:
    """A tracer whose spans are sent to a collector. What was recorded last is sent as the block ends, if that is quick.

    An address without a path stands for the one that collectors have by default.
    """
    session = requests.Session()
    session.trust_env = False  # as in all of the gateway, the proxies of the environment are for others
    exporter = OTLPSpanExporter(
        endpoint=url if urlsplit(url).path else url + _PATH,
        timeout=SEND_SECONDS,
        compression=Compression.Gzip,
        session=session,
    )
    spans = provider(share)
    with _seldom_heard():
        spans.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=QUEUED,
                max_export_batch_size=BATCH,
                schedule_delay_millis=EVERY_SECONDS * 1000,
                export_timeout_millis=SEND_SECONDS * 1000,
            )
        )
        try:
            yield OtelTracer(spans, clean)
        finally:
            await _ended(spans, exporter)


async def _ended(spans: TracerProvider, exporter: OTLPSpanExporter) -> None:
    """Send what is left, for a while. The provider's own end waits for half a minute, and nothing can shorten that."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def end() -> None:
        spans.shutdown()
        with suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=end, daemon=True).start()
    try:
        async with asyncio.timeout(FLUSH_SECONDS):
            await done.wait()
    except TimeoutError:
        _log.warning("traces.cut-short")
        # Ends its tries; the threads are daemons, which hold no process up.
        exporter.shutdown()  # type: ignore[no-untyped-call] # the SDK's own


class _Seldom(logging.Handler):
    """Says each sort of message once in a while: without a collector there is one for every batch and every try."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if record.levelno < logging.WARNING or now < self._said.get(record.msg, now):
            return
        self._said[record.msg] = now + SAID_AGAIN_SECONDS
        _log.warning("traces.troubled", logger=record.name, detail=record.getMessage())


@contextmanager
def _seldom_heard() -> Iterator[None]:
    """Let OpenTelemetry log no more than it must."""
    logger, seldom = logging.getLogger("opentelemetry"), _Seldom()
    logger.addHandler(seldom)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(seldom)
