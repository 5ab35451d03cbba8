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
from service.telemetry.logging import OUTCOME_ANSWERED
from service.telemetry.tracing import CLIENT_OUTCOME_PREFIX, NOOP_SPAN, NoopSpan, parse_trace_id

OUTCOME_ATTRIBUTE = "gateway.outcome"


TENANT_ATTRIBUTE = "gateway.tenant"


RESERVATION_ATTRIBUTE = "gateway.reservation"


REDACTED_PATH = "/REDACTED"


PROBE_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Machines ask for them every few seconds: they would outnumber everything else."""


_KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})


_OTHER_METHOD = "_OTHER"


_DEFAULT_PORTS = {"http": 80, "https": 443}


_PROPAGATOR = TraceContextTextMapPropagator()


class OtelTracer:
    """Records on a provider of its own: nothing of OpenTelemetry that is global is set or asked."""

    def __init__(self, provider: trace.TracerProvider, redact: Callable[[str], str]) -> None:
        self._tracer = provider.get_tracer("imaging-gateway", __version__, schema_url=Schemas.V1_33_0.value)
        self._redact = redact

    def start_request_span(self, scope: Mapping[str, Any]) -> _ServerSpan | NoopSpan:
        """Serve a request: in the trace it says it belongs to, else in a new one."""
        given = parse_trace_id(scope["headers"])
        if scope["path"] in PROBE_PATHS:
            return NoopSpan(given)
        method = scope["method"] if scope["method"] in _KNOWN_METHODS else "HTTP"
        # Not in the current context: a server may handle one request out of another's.
        context = _PROPAGATOR.extract(_extract_carrier(scope), Context()) if given else Context()
        span = self._tracer.start_span(method, context, SpanKind.SERVER)
        if span.is_recording():
            span.set_attributes(dict(self._request_attributes(scope)))
        return _ServerSpan(span, method, given)

    def start_linked_span(self, name: str, cause: str | None, reservation: str) -> _ParentSpan | NoopSpan:
        """Do what follows from other work."""
        if cause is None:
            return NOOP_SPAN
        caused = trace.get_current_span(_PROPAGATOR.extract({"traceparent": cause}, Context())).get_span_context()
        if not caused.is_valid:
            return NOOP_SPAN
        attributes = {RESERVATION_ATTRIBUTE: reservation}
        return _ParentSpan(self._tracer.start_span(name, Context(), SpanKind.INTERNAL, attributes, [Link(caused)]))

    def start_client_span(
        self, method: str, url: str, *, hide_path: bool = True, resend_count: int = 0
    ) -> _ClientSpan | NoopSpan:
        """Call another server. The query of its address is never recorded."""
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
        """Have the store do something; a script is a stored procedure in the words of the conventions."""
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
        """The context of what is done now, as a `traceparent`."""
        return _propagation_headers(trace.get_current_span())["traceparent"] if _is_recording() else None

    def _request_attributes(self, scope: Mapping[str, Any]) -> Iterator[tuple[str, str | int]]:
        """What is known of a request when it comes."""
        method, clean = scope["method"], self._redact
        yield http.HTTP_REQUEST_METHOD, method if method in _KNOWN_METHODS else _OTHER_METHOD
        if method not in _KNOWN_METHODS:
            yield http.HTTP_REQUEST_METHOD_ORIGINAL, clean(method)
        yield addresses.URL_SCHEME, scope["scheme"]
        yield addresses.URL_PATH, clean(quote(scope["path"]))
        yield network.NETWORK_PROTOCOL_VERSION, scope["http_version"]
        if scope["client"]:
            yield client.CLIENT_ADDRESS, scope["client"][0]
        headers = dict(scope["headers"])
        if b"user-agent" in headers:
            yield agent.USER_AGENT_ORIGINAL, clean(headers[b"user-agent"].decode("latin-1"))
        host, port = _split_host(headers.get(b"host", b"").decode("latin-1"), scope["scheme"])
        if host:
            yield server.SERVER_ADDRESS, clean(host)
            yield server.SERVER_PORT, port


class _LeafSpan:
    """A span that is no parent of others."""

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
    """A request to another server."""

    @property
    def propagation_headers(self) -> Mapping[str, str]:
        """The headers that pass the trace on."""
        return _propagation_headers(self._span)

    def record_response(self, status: int) -> None:
        """It was answered, if with an error."""
        self._span.set_attribute(http.HTTP_RESPONSE_STATUS_CODE, status)
        if status >= 400:
            self._set_error(str(status))


class _ParentSpan(_LeafSpan):
    """A span that is the parent of what is done in its block."""

    def __enter__(self) -> Self:
        self._token = contexts.attach(trace.set_span_in_context(self._span, Context()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        contexts.detach(self._token)
        super().__exit__(kind, error, traceback)


class _ServerSpan(_ParentSpan):
    """A request that is served."""

    def __init__(self, span: Span, method: str, client_trace_id: str | None) -> None:
        super().__init__(span)
        self._method = method
        self.trace_id = (
            trace.format_trace_id(span.get_span_context().trace_id) if span.is_recording() else client_trace_id
        )

    def record_response(self, status: int | None, *, route: str | None, outcome: str, tenant: str | None) -> None:
        """It has ended."""
        if not self._span.is_recording():
            return
        told: dict[str, str | int] = {OUTCOME_ATTRIBUTE: outcome}
        if route:
            told[http.HTTP_ROUTE] = route
            self._span.update_name(f"{self._method} {route}")
        if status:
            told[http.HTTP_RESPONSE_STATUS_CODE] = status
        if tenant:
            told[TENANT_ATTRIBUTE] = tenant
        self._span.set_attributes(told)
        error_type = _error_type(status, outcome)
        if error_type:
            self._set_error(error_type)


def _error_type(status: int | None, outcome: str) -> str | None:
    """In which way a request failed on our side; None if it did not."""
    if status is None or 400 <= status < 500 or outcome.startswith(CLIENT_OUTCOME_PREFIX):
        return None
    if status >= 500:
        return str(status) if outcome == OUTCOME_ANSWERED else outcome
    return None if outcome == OUTCOME_ANSWERED else outcome  # it failed after it had begun to answer


def _is_recording() -> bool:
    """Whether what is done now is recorded; its span may have ended meanwhile, as when a client has left."""
    return trace.get_current_span().get_span_context().trace_flags.sampled


def _propagation_headers(span: Span) -> Mapping[str, str]:
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers, trace.set_span_in_context(span, Context()))
    return MappingProxyType(headers)


def _extract_carrier(scope: Mapping[str, Any]) -> Mapping[str, list[str]]:
    """The headers that tell of a trace."""
    carrier: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        if name in {b"traceparent", b"tracestate"}:
            carrier.setdefault(name.decode(), []).append(value.decode("latin-1"))
    return carrier


def _split_url(url: str) -> tuple[str, str, str]:
    """Scheme, host with port, and path of what should be an address, without what identifies somebody."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("?")[0].partition("#")[0].partition("/")
    return scheme, authority.rpartition("@")[2], slash + path


def _split_host(authority: str, scheme: str) -> tuple[str, int]:
    """The name of a server and its port; the name is empty if what is given is none."""
    try:
        parts = urlsplit(f"//{authority}")
        return parts.hostname or "", parts.port or _DEFAULT_PORTS.get(scheme, 0)
    except ValueError:
        return "", 0


_log = structlog.get_logger(__name__)


EXPORT_TIMEOUT_SECONDS = 5.0
"""How long it is tried to send a batch."""


FLUSH_SECONDS = 5.0
"""How long the end of the process waits for what was recorded last to be sent."""


EXPORT_INTERVAL_SECONDS = 2.0


LOG_INTERVAL_SECONDS = 600.0


MAX_QUEUE_SIZE, MAX_BATCH_SIZE = 4_096, 512


MAX_VALUE_LENGTH = 500


_DEFAULT_PATH = "/v1/traces"


class LinkAwareSampler(TraceIdRatioBased):
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


def create_provider(sample_ratio: float) -> TracerProvider:
    """What spans are made with.

    OpenTelemetry reads some dozens of environment variables by itself. What is recorded, how much of it, and where it
    is sent is up to the gateway's own settings, so all of these are given. Left to the environment is what describes
    the process (`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SERVICE_NAME`), since platforms set that; how to be let in by the
    collector (`OTEL_EXPORTER_OTLP_HEADERS`, `..._CERTIFICATE`, `..._CLIENT_KEY`, `..._CLIENT_CERTIFICATE`), since these
    are the names under which such secrets are handed out; and `OTEL_SDK_DISABLED`, which turns all of it off.
    """
    own = {SERVICE_NAME: "imaging-gateway", SERVICE_VERSION: __version__, SERVICE_INSTANCE_ID: str(uuid4())}
    return TracerProvider(
        sampler=ParentBased(LinkAwareSampler(sample_ratio)),
        resource=Resource.create(own | dict(OTELResourceDetector().detect().attributes)),
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
    """A tracer whose spans are sent to a collector. What was recorded last is sent as the block ends, if that is quick.

    An address without a path stands for the one that collectors have by default.
    """
    session = requests.Session()
    session.trust_env = False  # as in all of the gateway, the proxies of the environment are for others
    exporter = OTLPSpanExporter(
        endpoint=url if urlsplit(url).path else url + _DEFAULT_PATH,
        timeout=EXPORT_TIMEOUT_SECONDS,
        compression=Compression.Gzip,
        session=session,
    )
    spans = create_provider(sample_ratio)
    with _throttle_sdk_logs():
        spans.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=MAX_QUEUE_SIZE,
                max_export_batch_size=MAX_BATCH_SIZE,
                schedule_delay_millis=EXPORT_INTERVAL_SECONDS * 1000,
                export_timeout_millis=EXPORT_TIMEOUT_SECONDS * 1000,
            )
        )
        try:
            yield OtelTracer(spans, redact)
        finally:
            await _shut_down(spans, exporter)


async def _shut_down(spans: TracerProvider, exporter: OTLPSpanExporter) -> None:
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
        _log.warning("tracing.flush_timeout")
        # Ends its tries; the threads are daemons, which hold no process up.
        exporter.shutdown()  # type: ignore[no-untyped-call] # the SDK's own


class _ThrottledHandler(logging.Handler):
    """Says each sort of message once in a while: without a collector there is one for every batch and every try."""

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
    """Let OpenTelemetry log no more than it must."""
    logger, seldom = logging.getLogger("opentelemetry"), _ThrottledHandler()
    logger.addHandler(seldom)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(seldom)
