"""Traces of requests across processes and servers.

The gateway reports to a `Tracer`. Without a collector that is NOOP_TRACER; only `tracing_otel` imports OpenTelemetry,
which is an optional dependency.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Protocol, Self

Headers = Iterable[tuple[bytes, bytes]]
"""The headers of an ASGI request; names in lower case."""
CLIENT_OUTCOME_PREFIX = "client-"
"""Outcomes with this prefix are caused by the client."""
_TRACEPARENT = re.compile(
    rb"(?P<version>(?!ff)[0-9a-f]{2})"
    rb"-(?P<trace>(?!0{32})[0-9a-f]{32})"
    rb"-(?P<span>(?!0{16})[0-9a-f]{16})"
    rb"-(?P<flags>[0-9a-f]{2})"
    rb"(?P<more>-.*)?"
)


def parse_trace_id(headers: Headers) -> str | None:
    """Return the trace id of a valid `traceparent` as 32 hex digits, else None.

    Of a later version only the part is parsed that all versions have.
    """
    values = [value for name, value in headers if name == b"traceparent"]
    if len(values) != 1:  # several are ambiguous
        return None
    match = _TRACEPARENT.fullmatch(values[0].strip(b" \t"))
    if match is None or (match["more"] is not None and match["version"] == b"00"):
        return None
    return match["trace"].decode()


class RequestSpan(Protocol):
    """The span of a request to the gateway."""

    @property
    def trace_id(self) -> str | None:
        """Return the recorded trace, else the trace of the client."""

    def record_response(self, status: int | None, *, route: str | None, outcome: str, tenant: str | None) -> None:
        """Record the end; `status` is None if there was no response."""


class CallSpan(Protocol):
    """The span of a request to another server; fails with the exception of its block."""

    @property
    def propagation_headers(self) -> Mapping[str, str]:
        """Return the headers by which the other server can join the trace."""

    def record_response(self, status: int) -> None: ...


class Tracer(Protocol):
    """A recorder of spans, each for the duration of a block.

    No method raises or waits. Values of clients, tenants and the upstream are recorded only where a method documents
    it.
    """

    def start_request_span(self, scope: Mapping[str, Any]) -> AbstractContextManager[RequestSpan]:
        """Start the span of an ASGI request: method, path, host and user agent, redacted."""

    def start_linked_span(self, name: str, cause: str | None, reservation: str) -> AbstractContextManager[object]:
        """Start a trace of its own, linked to that of `cause` (a traceparent, or None if unrecorded).

        Traces are not kept open for days, so later work gets a new one.
        """

    def start_client_span(
        self, method: str, url: str, *, hide_path: bool = True, resend_count: int = 0
    ) -> AbstractContextManager[CallSpan]:
        """Start the span of a request to another server if its parent is recorded.

        The path is hidden where it may grant access.
        """

    def start_redis_span(
        self, operation: str, *, script: str | None = None, batch_size: int = 1
    ) -> AbstractContextManager[object]:
        """Start the span of a Redis call if its parent is recorded."""

    def current_traceparent(self) -> str | None:
        """Return the current context for a later `start_linked_span`; None if unrecorded."""


class NoopSpan:
    """A span of any kind that records nothing."""

    propagation_headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, trace: str | None = None) -> None:
        self.trace_id = trace

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record_response(self, *_: object, **__: object) -> None:
        pass


NOOP_SPAN = NoopSpan()


class _NoopTracer:
    def start_request_span(self, scope: Mapping[str, Any]) -> NoopSpan:
        return NoopSpan(parse_trace_id(scope["headers"]))

    def start_linked_span(self, *_: object, **__: object) -> NoopSpan:
        return NOOP_SPAN

    def start_client_span(self, *_: object, **__: object) -> NoopSpan:
        return NOOP_SPAN

    def start_redis_span(self, *_: object, **__: object) -> NoopSpan:
        return NOOP_SPAN

    def current_traceparent(self) -> None:
        return None


NOOP_TRACER: Tracer = _NoopTracer()


def is_exporter_installed() -> bool:
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http.trace_exporter") is not None
    except ModuleNotFoundError:
        return False
