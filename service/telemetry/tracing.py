"""Spans by OpenTelemetry's semantic conventions for HTTP, databases and errors.

Without a provider (see `tracing_otel`) the tracer is a NoOpTracer, no span becomes current, and nothing is recorded or
sent. Server spans are errors from status 500, client spans from 400. Messages of exceptions are never recorded: they
contain addresses and texts of others. The provider redacts the attributes given at the start of a span.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any
from urllib.parse import quote, urlsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Link, NoOpTracer, Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.telemetry.logging import OUTCOME_ANSWERED

NOOP_TRACER = NoOpTracer()
CLIENT_OUTCOME_PREFIX = "client-"
"""Outcomes with this prefix are caused by the client."""
PROBE_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Requested every few seconds by machines: they would outnumber everything else."""
_HIDDEN_PATH = "/REDACTED"
_KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_DEFAULT_PORTS = {"http": 80, "https": 443}
PARENT_HEADER = b"traceparent"
_TRACE_HEADERS = {PARENT_HEADER: "traceparent", b"tracestate": "tracestate"}
_PROPAGATOR = TraceContextTextMapPropagator()
_ROOT = Context()


@contextmanager
def start_request_span(tracer: Tracer, scope: Mapping[str, Any]) -> Iterator[Span]:
    """Start the span of an ASGI request. Yields the client's span if the request is not recorded."""
    context = _extract_context(scope["headers"])
    if isinstance(tracer, NoOpTracer) or scope["path"] in PROBE_PATHS:
        yield trace.get_current_span(context)
        return
    span = tracer.start_span(_method_name(scope["method"]), context, SpanKind.SERVER, _request_attributes(scope))
    with _record(span):
        yield span if span.is_recording() else trace.get_current_span(context)


def record_request_end(
    span: Span, method: str, status: int | None, *, route: str | None, outcome: str, tenant: str | None
) -> None:
    """Record how a request ended; `status` is None if there was no response."""
    if not span.is_recording():
        return
    span.set_attribute("gateway.outcome", outcome)
    if route:
        span.set_attribute("http.route", route)
        span.update_name(f"{_method_name(method)} {route}")
    if status:
        span.set_attribute("http.response.status_code", status)
    if tenant:
        span.set_attribute("gateway.tenant", tenant)
    if error_type := _error_type(status, outcome):
        record_error(span, error_type)


def start_linked_span(tracer: Tracer, name: str, cause: str | None, reservation: str) -> AbstractContextManager[Span]:
    """Start a trace of its own, linked to that of `cause` (a traceparent, or None if unrecorded).

    Traces are not kept open for days, so later work gets a new one.
    """
    carrier = {} if cause is None else {"traceparent": cause}
    cause_context = trace.get_current_span(_PROPAGATOR.extract(carrier, _ROOT)).get_span_context()
    if not cause_context.is_valid:
        return INVALID_SPAN
    attributes = {"gateway.reservation": reservation}
    return _record(tracer.start_span(name, _ROOT, SpanKind.INTERNAL, attributes, [Link(cause_context)]))


def start_client_span(
    tracer: Tracer, method: str, url: str, *, hide_path: bool = True, resend_count: int = 0
) -> AbstractContextManager[Span]:
    """Start the span of a request to another server if its parent is recorded.

    The path is hidden where it may grant access; credentials and query are never recorded.
    """
    if not _is_recorded():
        return INVALID_SPAN
    name, attributes = method, {"http.request.method": method} | _address_attributes(url)
    with suppress(ValueError):
        parts = urlsplit(url)
        path = _HIDDEN_PATH if hide_path else parts.path
        attributes["url.full"] = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"
        if not hide_path:
            name = f"{method} {path}"
    if resend_count:
        attributes["http.request.resend_count"] = resend_count
    return _record(tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes))


def record_status(span: Span, status: int) -> None:
    """Record the status that another server responded with."""
    span.set_attribute("http.response.status_code", status)
    if status >= 400:
        record_error(span, str(status))


def record_error(span: Span, error_type: str) -> None:
    """Record that the work of a span failed, and the type of the error or the status."""
    span.set_attribute("error.type", error_type)
    span.set_status(StatusCode.ERROR)


def start_redis_span(
    tracer: Tracer, operation: str, *, script: str | None = None, batch_size: int = 1
) -> AbstractContextManager[Span]:
    """Start the span of a Redis call if its parent is recorded."""
    if not _is_recorded():
        return INVALID_SPAN
    attributes: dict[str, str | int] = {"db.system.name": "redis", "db.operation.name": operation}
    if script:
        attributes["db.stored_procedure.name"] = script
    if batch_size > 1:
        attributes["db.operation.batch.size"] = batch_size
    name = f"{operation} {script}" if script else operation
    return _record(tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes))


def trace_headers() -> dict[str, str]:
    """Return the headers by which other servers and later work can join the current span; empty if unrecorded."""
    headers: dict[str, str] = {}
    if _is_recorded():
        _PROPAGATOR.inject(headers)
    return headers


def trace_id_of(span: Span) -> str | None:
    """Return the trace of a span as 32 hex digits; None if the span is invalid."""
    context = span.get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else None


@contextmanager
def _record(span: Span) -> Iterator[Span]:
    """Make a span current for a block and end it there; of an exception only the type is recorded."""
    with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield span
        except BaseException as error:
            kind = type(error)
            record_error(span, f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."))
            raise


def _is_recorded() -> bool:
    # Not `is_recording`: work may continue after its request has ended.
    return trace.get_current_span().get_span_context().trace_flags.sampled


def _extract_context(headers: Iterable[tuple[bytes, bytes]]) -> Context:
    carrier: dict[str, list[str]] = {}
    for name, value in headers:
        if name in _TRACE_HEADERS:
            carrier.setdefault(_TRACE_HEADERS[name], []).append(value.decode("latin-1"))
    # Several are ambiguous.
    return _PROPAGATOR.extract(carrier, _ROOT) if len(carrier.get("traceparent", ())) == 1 else _ROOT


def _method_name(method: str) -> str:
    return method if method in _KNOWN_METHODS else "HTTP"


def _request_attributes(scope: Mapping[str, Any]) -> dict[str, str | int]:
    method, headers = scope["method"], dict(scope["headers"])
    attributes: dict[str, str | int] = {
        "http.request.method": method if method in _KNOWN_METHODS else "_OTHER",
        "url.scheme": scope["scheme"],
        "url.path": quote(scope["path"]),
        "network.protocol.version": scope["http_version"],
    }
    if method not in _KNOWN_METHODS:
        attributes["http.request.method_original"] = method
    if scope["client"]:
        attributes["client.address"] = scope["client"][0]
    if b"user-agent" in headers:
        attributes["user_agent.original"] = headers[b"user-agent"].decode("latin-1")
    return attributes | _address_attributes(f"{scope['scheme']}://{headers.get(b'host', b'').decode('latin-1')}")


def _address_attributes(url: str) -> dict[str, str | int]:
    """Return host and port of a URL; nothing if it is invalid."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    except ValueError:
        return {}
    return {"server.address": host, "server.port": port} if host else {}


def _error_type(status: int | None, outcome: str) -> str | None:
    """Return how a request failed on the gateway's side; None if it did not."""
    if status is None or 400 <= status < 500 or outcome.startswith(CLIENT_OUTCOME_PREFIX):
        return None
    if outcome != OUTCOME_ANSWERED:
        return outcome  # possibly failed after the response had started
    return str(status) if status >= 500 else None
