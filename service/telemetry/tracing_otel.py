"""The tracer for OpenTelemetry, which follows the semantic conventions for HTTP, databases and errors.

Server spans are errors from status 500, client spans from 400. Messages of exceptions are never recorded: they contain
addresses and texts of others. Export happens in a thread with a bounded queue; spans that do not fit or can't be sent
are dropped.
"""

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
from service.telemetry.logging import OUTCOME_ANSWERED
from service.telemetry.tracing import CLIENT_OUTCOME_PREFIX, NOOP_SPAN, NoopSpan, parse_trace_id

_log = structlog.get_logger(__name__)

OUTCOME_ATTRIBUTE = "gateway.outcome"
TENANT_ATTRIBUTE = "gateway.tenant"
RESERVATION_ATTRIBUTE = "gateway.reservation"
REDACTED_PATH = "/REDACTED"
PROBE_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Requested every few seconds by machines: they would outnumber everything else."""
_KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_OTHER_METHOD = "_OTHER"
_DEFAULT_PORTS = {"http": 80, "https": 443}
_PROPAGATOR = TraceContextTextMapPropagator()


class OtelTracer:
    """A tracer with a provider of its own; no global state of OpenTelemetry is used."""

    def __init__(self, provider: trace.TracerProvider, redact: Callable[[str], str]) -> None:
        self._tracer = provider.get_tracer("imaging-gateway", __version__, schema_url=Schemas.V1_33_0.value)
        self._redact = redact

    def start_request_span(self, scope: Mapping[str, Any]) -> _ServerSpan | NoopSpan:
        client_trace_id = parse_trace_id(scope["headers"])
        if scope["path"] in PROBE_PATHS:
            return NoopSpan(client_trace_id)
        method = scope["method"] if scope["method"] in _KNOWN_METHODS else "HTTP"
        # Not the current context: the server may start a pipelined request within another one.
        context = _PROPAGATOR.extract(_extract_carrier(scope), Context()) if client_trace_id else Context()
        span = self._tracer.start_span(method, context, SpanKind.SERVER)
        if span.is_recording():
            span.set_attributes(dict(self._request_attributes(scope)))
        return _ServerSpan(span, method, client_trace_id)

    def start_linked_span(self, name: str, cause: str | None, reservation: str) -> _ParentSpan | NoopSpan:
        if cause is None:
            return NOOP_SPAN
        cause_context = trace.get_current_span(
            _PROPAGATOR.extract({"traceparent": cause}, Context())
        ).get_span_context()
        if not cause_context.is_valid:
            return NOOP_SPAN
        attributes = {RESERVATION_ATTRIBUTE: reservation}
        return _ParentSpan(
            self._tracer.start_span(name, Context(), SpanKind.INTERNAL, attributes, [Link(cause_context)])
        )

    def start_client_span(
        self, method: str, url: str, *, hide_path: bool = True, resend_count: int = 0
    ) -> _ClientSpan | NoopSpan:
        """Start a client span; the query is never recorded."""
        if not _is_recording():
            return NOOP_SPAN
        scheme, authority, path = _split_url(url)
        host, port = _split_host(authority, scheme)
        path = REDACTED_PATH if hide_path else self._redact(path)
        attributes: dict[str, str | int] = {
            http.HTTP_REQUEST_METHOD: method,
            server.SERVER_ADDRESS: self._redact(host),
            server.SERVER_PORT: port,
            addresses.URL_FULL: self._redact(f"{scheme}://{authority}{path}"),
        }
        if resend_count:
            attributes[http.HTTP_REQUEST_RESEND_COUNT] = resend_count
        name = method if hide_path else f"{method} {path}"
        return _ClientSpan(self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes))

    def start_redis_span(
        self, operation: str, *, script: str | None = None, batch_size: int = 1
    ) -> _LeafSpan | NoopSpan:
        if not _is_recording():
            return NOOP_SPAN
        attributes: dict[str, str | int] = {db.DB_SYSTEM_NAME: "redis", db.DB_OPERATION_NAME: operation}
        if script:
            attributes[db.DB_STORED_PROCEDURE_NAME] = script
        if batch_size > 1:
            attributes[db.DB_OPERATION_BATCH_SIZE] = batch_size
        name = f"{operation} {script}" if script else operation
        return _LeafSpan(self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes))

    def current_traceparent(self) -> str | None:
        return _propagation_headers(trace.get_current_span())["traceparent"] if _is_recording() else None

    def _request_attributes(self, scope: Mapping[str, Any]) -> Iterator[tuple[str, str | int]]:
        method, redact = scope["method"], self._redact
        yield http.HTTP_REQUEST_METHOD, method if method in _KNOWN_METHODS else _OTHER_METHOD
        if method not in _KNOWN_METHODS:
            yield http.HTTP_REQUEST_METHOD_ORIGINAL, redact(method)
        yield addresses.URL_SCHEME, scope["scheme"]
        yield addresses.URL_PATH, redact(quote(scope["path"]))
        yield network.NETWORK_PROTOCOL_VERSION, scope["http_version"]
        if scope["client"]:
            yield client.CLIENT_ADDRESS, scope["client"][0]
        headers = dict(scope["headers"])
        if b"user-agent" in headers:
            yield agent.USER_AGENT_ORIGINAL, redact(headers[b"user-agent"].decode("latin-1"))
        host, port = _split_host(headers.get(b"host", b"").decode("latin-1"), scope["scheme"])
        if host:
            yield server.SERVER_ADDRESS, redact(host)
            yield server.SERVER_PORT, port


class _LeafSpan:
    """A span without children."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._set_error(
                kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
            )
        self._span.end()

    def _set_error(self, error_type: str) -> None:
        self._span.set_attribute(errors.ERROR_TYPE, error_type)
        self._span.set_status(StatusCode.ERROR)


class _ClientSpan(_LeafSpan):
    @property
    def propagation_headers(self) -> Mapping[str, str]:
        return _propagation_headers(self._span)

    def record_response(self, status: int) -> None:
        self._span.set_attribute(http.HTTP_RESPONSE_STATUS_CODE, status)
        if status >= 400:
            self._set_error(str(status))


class _ParentSpan(_LeafSpan):
    """A span that is the parent of the spans in its block."""

    def __enter__(self) -> Self:
        self._token = contexts.attach(trace.set_span_in_context(self._span, Context()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        contexts.detach(self._token)
        super().__exit__(kind, error, traceback)


class _ServerSpan(_ParentSpan):
    def __init__(self, span: Span, method: str, client_trace_id: str | None) -> None:
        super().__init__(span)
        self._method = method
        self.trace_id = (
            trace.format_trace_id(span.get_span_context().trace_id) if span.is_recording() else client_trace_id
        )

    def record_response(self, status: int | None, *, route: str | None, outcome: str, tenant: str | None) -> None:
        if not self._span.is_recording():
            return
        attributes: dict[str, str | int] = {OUTCOME_ATTRIBUTE: outcome}
        if route:
            attributes[http.HTTP_ROUTE] = route
            self._span.update_name(f"{self._method} {route}")
        if status:
            attributes[http.HTTP_RESPONSE_STATUS_CODE] = status
        if tenant:
            attributes[TENANT_ATTRIBUTE] = tenant
        self._span.set_attributes(attributes)
        error_type = _error_type(status, outcome)
        if error_type:
            self._set_error(error_type)


def _error_type(status: int | None, outcome: str) -> str | None:
    """Return how a request failed on the gateway's side; None if it did not."""
    if status is None or 400 <= status < 500 or outcome.startswith(CLIENT_OUTCOME_PREFIX):
        return None
    if status >= 500:
        return str(status) if outcome == OUTCOME_ANSWERED else outcome
    return None if outcome == OUTCOME_ANSWERED else outcome  # failed after the response had started


def _is_recording() -> bool:
    return trace.get_current_span().get_span_context().trace_flags.sampled


def _propagation_headers(span: Span) -> Mapping[str, str]:
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers, trace.set_span_in_context(span, Context()))
    return MappingProxyType(headers)


def _extract_carrier(scope: Mapping[str, Any]) -> Mapping[str, list[str]]:
    carrier: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        if name in {b"traceparent", b"tracestate"}:
            carrier.setdefault(name.decode(), []).append(value.decode("latin-1"))
    return carrier


def _split_url(url: str) -> tuple[str, str, str]:
    """Return scheme, host with port, and path, without credentials."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("?")[0].partition("#")[0].partition("/")
    return scheme, authority.rpartition("@")[2], slash + path


def _split_host(authority: str, scheme: str) -> tuple[str, int]:
    """Return host and port; the host is empty if invalid."""
    try:
        parts = urlsplit(f"//{authority}")
        return parts.hostname or "", parts.port or _DEFAULT_PORTS.get(scheme, 0)
    except ValueError:
        return "", 0


EXPORT_TIMEOUT_SECONDS = 5.0
FLUSH_SECONDS = 5.0
"""How long shutdown waits for the last spans to be sent."""
EXPORT_INTERVAL_SECONDS = 2.0
LOG_INTERVAL_SECONDS = 600.0
MAX_QUEUE_SIZE, MAX_BATCH_SIZE = 4_096, 512
MAX_VALUE_LENGTH = 500
_DEFAULT_PATH = "/v1/traces"


class LinkAwareSampler(TraceIdRatioBased):
    """A sampler by ratio; a linked span was already sampled with its cause."""

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
        if links:
            return ALWAYS_ON.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        return super().should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)


def create_provider(sample_ratio: float) -> TracerProvider:
    """Create a provider that is configured by the gateway's settings.

    OpenTelemetry reads dozens of environment variables, so all limits are set here. Still read from the environment are
    the description of the process (`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SERVICE_NAME`), which platforms set; the
    credentials of the collector (`OTEL_EXPORTER_OTLP_HEADERS`, `..._CERTIFICATE`, `..._CLIENT_KEY`,
    `..._CLIENT_CERTIFICATE`); and `OTEL_SDK_DISABLED`.
    """
    attributes = {SERVICE_NAME: "imaging-gateway", SERVICE_VERSION: __version__, SERVICE_INSTANCE_ID: str(uuid4())}
    return TracerProvider(
        sampler=ParentBased(LinkAwareSampler(sample_ratio)),
        resource=Resource.create(attributes | dict(OTELResourceDetector().detect().attributes)),
        shutdown_on_exit=False,
        span_limits=SpanLimits(
            max_attributes=32,
            max_events=0,
            max_links=1,
            max_span_attributes=32,
            max_event_attributes=0,
            max_link_attributes=0,
            max_attribute_length=MAX_VALUE_LENGTH,
            max_span_attribute_length=MAX_VALUE_LENGTH,
        ),
    )


@asynccontextmanager
async def open_exporting_tracer(
    url: str, sample_ratio: float, redact: Callable[[str], str]
) -> AsyncIterator[OtelTracer]:
    """Open a tracer that exports to `url`, by default at the path of OTLP."""
    session = requests.Session()
    session.trust_env = False  # no proxies of the environment, as in all clients here
    exporter = OTLPSpanExporter(
        endpoint=url if urlsplit(url).path else url + _DEFAULT_PATH,
        timeout=EXPORT_TIMEOUT_SECONDS,
        compression=Compression.Gzip,
        session=session,
    )
    provider = create_provider(sample_ratio)
    with _throttle_sdk_logs():
        provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=MAX_QUEUE_SIZE,
                max_export_batch_size=MAX_BATCH_SIZE,
                schedule_delay_millis=EXPORT_INTERVAL_SECONDS * 1000,
                export_timeout_millis=EXPORT_TIMEOUT_SECONDS * 1000,
            )
        )
        try:
            yield OtelTracer(provider, redact)
        finally:
            await _shut_down(provider, exporter)


async def _shut_down(provider: TracerProvider, exporter: OTLPSpanExporter) -> None:
    """Send the remaining spans for a while: the provider's own shutdown waits 30 s and can't be shortened."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def shut_down() -> None:
        provider.shutdown()
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=shut_down, daemon=True).start()
    try:
        async with asyncio.timeout(FLUSH_SECONDS):
            await done.wait()
    except TimeoutError:
        _log.warning("tracing.flush_timeout")
        # Ends the retries; the daemon threads do not keep the process alive.
        exporter.shutdown()  # type: ignore[no-untyped-call] # the SDK's own


class _ThrottledHandler(logging.Handler):
    """A handler that repeats a message only after an interval: an unreachable collector causes one per retry."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet_until: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if record.levelno < logging.WARNING or now < self._quiet_until.get(record.msg, now):
            return
        self._quiet_until[record.msg] = now + LOG_INTERVAL_SECONDS
        _log.warning("tracing.export_failed", logger=record.name, detail=record.getMessage())


@contextmanager
def _throttle_sdk_logs() -> Iterator[None]:
    logger, handler = logging.getLogger("opentelemetry"), _ThrottledHandler()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)
