"""Traces: what follows from a request, over processes and servers, for whoever has a collector for them.

The rest of the gateway reports to a `Tracer`. Without a collector that is `UNTRACED`, which does nothing; what is sent
to one is made in `otel/`, which alone imports OpenTelemetry: that is not there unless it was asked for.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Protocol, Self

Headers = Iterable[tuple[bytes, bytes]]
"""The headers of a request as ASGI gives them: their names in lower case."""

CLIENT_OUTCOME_PREFIX = "client-"
"""How the outcomes begin that are the client's doing."""

_TRACEPARENT = re.compile(
    rb"(?P<version>(?!ff)[0-9a-f]{2})"
    rb"-(?P<trace>(?!0{32})[0-9a-f]{32})"
    rb"-(?P<span>(?!0{16})[0-9a-f]{16})"
    rb"-(?P<flags>[0-9a-f]{2})"
    rb"(?P<more>-.*)?"
)


def parse_trace_id(headers: Headers) -> str | None:
    """The trace a request says it belongs to, as 32 hexadecimal digits; None if it does not say so as it should.

    Of a later version than ours that part is read which every version has.
    """
    given = [value for name, value in headers if name == b"traceparent"]
    if len(given) != 1:  # of several nobody knows which is meant
        return None
    read = _TRACEPARENT.fullmatch(given[0].strip(b" \t"))
    if read is None or (read["more"] is not None and read["version"] == b"00"):
        return None
    return read["trace"].decode()


class RequestSpan(Protocol):
    """A request that is served."""

    @property
    def trace_id(self) -> str | None:
        """The trace it belongs to: the one it is recorded in, else the one that its client named."""
        ...

    def record_response(self, status: int | None, *, route: str | None, outcome: str, tenant: str | None) -> None:
        """It has ended; `status` is None if nothing was answered."""
        ...


class CallSpan(Protocol):
    """A request to another server. Its failure is what is raised out of its block."""

    @property
    def propagation_headers(self) -> Mapping[str, str]:
        """Headers by which the other server can make its work a part of this trace."""
        ...

    def record_response(self, status: int) -> None:
        """It was answered."""
        ...


class Tracer(Protocol):
    """Records what is done, as spans that last as long as a block.

    Nothing here raises or waits, and what is raised in a block passes through. Nothing that was given or chosen by a
    client, a tenant or the upstream is recorded, but for what a method says.
    """

    def start_request_span(self, scope: Mapping[str, Any]) -> AbstractContextManager[RequestSpan]:
        """Serve a request, of an ASGI scope: all that is done in the block belongs to it.

        Of what the client sent, its method, path, host and name are recorded, as far as they hold no secret.
        """
        ...

    def start_linked_span(self, name: str, cause: str | None, reservation: str) -> AbstractContextManager[object]:
        """Do what follows, later or elsewhere, from the work of which `cause` is the context.

        It gets a trace of its own, with a link to that of its cause: a trace is not kept open for days. It is recorded
        if its cause was, which otherwise is None.
        """
        ...

    def start_client_span(
        self, method: str, url: str, *, hide_path: bool = True, resend_count: int = 0
    ) -> AbstractContextManager[CallSpan]:
        """Call another server, for the `resent`th time anew, if it is for something that is recorded.

        The path is recorded unless it is `private`, as where somebody else chose it and it may be what gives access.
        """
        ...

    def start_redis_span(
        self, operation: str, *, script: str | None = None, batch_size: int = 1
    ) -> AbstractContextManager[object]:
        """Have the store do something, in its own words, if it is for something that is recorded."""
        ...

    def current_traceparent(self) -> str | None:
        """The context of what is done now, for a later `follow_up`; None if that is not recorded."""
        ...


class NoopSpan:
    """A span of any kind that is not recorded."""

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
    """The tracer of a gateway without a collector."""

    def start_request_span(self, scope: Mapping[str, Any]) -> NoopSpan:
        """Know which trace a request belongs to, for the log."""
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
    """Whether that is installed which sends traces."""
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http.trace_exporter") is not None
    except ModuleNotFoundError:
        return False


@asynccontextmanager
async def open_tracer(url: str | None, sample_ratio: float, redact: Callable[[str], str]) -> AsyncIterator[Tracer]:
    """A tracer, which sends to a collector at `url` if there is one: all that clients trace, and a share of the rest.

    `clean` takes the secrets out of what clients sent. What was recorded last is sent as the block ends.
    """
    if url is None:
        yield NOOP_TRACER
        return
    from service.telemetry.tracing_otel import open_exporting_tracer  # noqa: PLC0415 - need not be installed, and takes its time

    async with open_exporting_tracer(url, sample_ratio, redact) as tracer:
        yield tracer
