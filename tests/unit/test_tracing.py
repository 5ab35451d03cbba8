"""Request spans by OpenTelemetry's semantic conventions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import structlog
from litestar import Litestar, Request, Response, get
from litestar.params import FromPath
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry

from service.api.asgi import RequestMiddleware
from service.api.errors import OUTCOME, ClientDisconnected, exception_handlers
from service.domain.errors import LedgerUnavailable, NotFound
from service.telemetry import tracing
from service.telemetry.metrics import Metrics, Port
from service.telemetry.tracing import NOOP_TRACER
from tests.support.traces import SPAN, TRACE, SpanRecorder
from tests.unit.asgi_client import AsgiResponse, call_app, make_http_scope

SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"
ADMIN_TOKEN = "the-token-of-the-operators"


@get("/things/{thing:str}")
async def thing(request: Request[Any, Any, Any], thing: FromPath[str]) -> Response[dict[str, str]]:
    request.scope["state"]["tenant"] = "demo"
    match thing:
        case "missing":
            raise NotFound("No such thing.")
        case "away":
            raise LedgerUnavailable("Not now.", retry_after=1)
        case "crash":
            raise ZeroDivisionError("with private words")
        case "left":
            raise ClientDisconnected
        case "broken":
            request.scope["state"][OUTCOME] = "transfer-aborted"
        case "slow":
            request.scope["state"][OUTCOME] = "client-too-slow"
    return Response(dict(structlog.contextvars.get_contextvars()))


@get(["/healthz", "/readyz", "/metrics"])
async def probe() -> None:
    """Respond with an empty body."""


async def send_request(
    tracer: Tracer, path: str, method: str = "GET", headers: Mapping[str, str] | None = None
) -> AsgiResponse | None:
    def silent(_logger: Any, _method: str, _event: Any) -> Any:
        raise structlog.DropEvent

    logger = structlog.wrap_logger(None, processors=[silent], wrapper_class=structlog.make_filtering_bound_logger(0))
    inner = Litestar([thing, probe], exception_handlers=exception_handlers(logger), openapi_config=None)
    app = RequestMiddleware(inner, Metrics(CollectorRegistry()), logger, Port.TENANTS, tracer)
    return await call_app(app, method, path, headers=headers)


async def read_bound_context(tracer: Tracer, **headers: str) -> dict[str, str]:
    """Return the context variables of the log during a request."""
    response = await send_request(tracer, "/things/one", headers=headers)
    assert response is not None
    names: dict[str, str] = response.json()
    return names


async def test_request_span() -> None:
    recorder = SpanRecorder()
    headers = {"Host": "gateway.internal:8080", "User-Agent": "curl/9", "Authorization": "Bearer igw_x"}
    await send_request(recorder.tracer, "/things/one?key=hunter2", headers=headers)
    span = recorder.span
    assert (span.name, span.kind, span.parent_id, span.is_error) == ("GET /things/{thing}", "server", "", False)
    assert span.attributes == {
        "http.request.method": "GET",
        "http.route": "/things/{thing}",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": "/things/one",
        "network.protocol.version": "1.1",
        "server.address": "gateway.internal",
        "server.port": 8080,
        "client.address": "127.0.0.1",
        "user_agent.original": "curl/9",
        "gateway.tenant": "demo",
        "gateway.outcome": "answered",
    }


@pytest.mark.parametrize(
    ("path", "status", "error", "outcome"),
    [
        ("/things/missing", 404, None, "not-found"),
        ("/nowhere", 404, None, "not-found"),
        ("/things/away", 503, "ledger-unavailable", "ledger-unavailable"),
        ("/things/crash", 500, "internal-error", "internal-error"),
        ("/things/left", None, None, "client-disconnected"),
        ("/things/broken", 200, "transfer-aborted", "transfer-aborted"),
        ("/things/slow", 200, None, "client-too-slow"),
    ],
)
async def test_span_status_by_outcome(path: str, status: int | None, error: str | None, outcome: str) -> None:
    recorder = SpanRecorder()
    await send_request(recorder.tracer, path)
    span = recorder.span
    assert span.attributes.get("http.response.status_code") == status
    assert span.attributes["gateway.outcome"] == outcome
    assert span.attributes.get("error.type") == error
    assert (span.is_error, span.status_message, span.event_count) == (error is not None, "", 0)


async def test_unknown_path_has_no_route() -> None:
    recorder = SpanRecorder()
    await send_request(recorder.tracer, "/nowhere/at/all")
    assert recorder.span.name == "GET"
    assert "http.route" not in recorder.span.attributes


async def test_unknown_method() -> None:
    recorder = SpanRecorder()
    await send_request(recorder.tracer, "/things/one", "BREW")
    assert recorder.span.name.split()[0] == "HTTP"
    attributes = recorder.span.attributes
    assert (attributes["http.request.method"], attributes["http.request.method_original"]) == ("_OTHER", "BREW")


@pytest.mark.parametrize("host", ["", "[::1", "host:port", "host:99999999"])
async def test_invalid_host_is_omitted(host: str) -> None:
    recorder = SpanRecorder()
    with tracing.start_request_span(recorder.tracer, make_http_scope(headers={"host": host}) | {"client": None}):
        pass
    assert not {"server.address", "server.port", "client.address"} & recorder.span.attributes.keys()


async def test_secrets_are_not_recorded() -> None:
    recorder = SpanRecorder(secrets=[ADMIN_TOKEN])
    headers = {"User-Agent": f"curl token=abcdefgh {ADMIN_TOKEN}", "Host": f"{ADMIN_TOKEN}:80"}
    await send_request(recorder.tracer, f"/things/igw_0123456789abcdef0123/\x00ÿ{ADMIN_TOKEN}", headers=headers)
    text = str(recorder.span)
    assert not [secret for secret in ("igw_0", "abcdefgh", ADMIN_TOKEN) if secret in text]
    assert recorder.span.attributes["url.path"].endswith("%00%C3%BF[redacted]")


async def test_long_values_are_truncated() -> None:
    recorder = SpanRecorder()
    await send_request(recorder.tracer, "/" + "x" * 5_000)
    assert len(recorder.span.attributes["url.path"]) == 500


async def test_parent_context_is_used() -> None:
    recorder = SpanRecorder()
    names = await read_bound_context(recorder.tracer, traceparent=SAMPLED, tracestate="tool=of-a-caller")
    span = recorder.span
    assert (span.trace_id, span.parent_id, span.trace_state) == (TRACE, SPAN, "tool=of-a-caller")
    assert names["trace_id"] == TRACE


@pytest.mark.parametrize("header", [f"00-{TRACE}-{SPAN}-1", f"00-{'0' * 32}-{SPAN}-01", "x"])
async def test_invalid_parent_starts_a_trace(header: str) -> None:
    recorder = SpanRecorder()
    names = await read_bound_context(recorder.tracer, traceparent=header)
    assert recorder.span.parent_id == ""
    assert names["trace_id"] == recorder.span.trace_id != TRACE


async def test_parent_sampling_is_followed() -> None:
    some, none = SpanRecorder(share=0.0), SpanRecorder(share=1.0)
    assert (await read_bound_context(some.tracer, traceparent=SAMPLED))["trace_id"] == TRACE
    assert (await read_bound_context(none.tracer, traceparent=UNSAMPLED))["trace_id"] == TRACE
    assert (len(some.spans), len(none.spans)) == (1, 0)


async def test_sampling_ratio() -> None:
    recorder, named = SpanRecorder(share=0.5), []
    for _ in range(200):
        with tracing.start_request_span(recorder.tracer, make_http_scope()) as span:
            named.append(tracing.trace_id_of(span) is not None)
    assert named.count(True) == len(recorder.spans)
    assert 50 < len(recorder.spans) < 150


def test_several_parents_are_ambiguous() -> None:
    scope = make_http_scope()
    scope["headers"] = [(b"traceparent", SAMPLED.encode())] * 2
    recorder = SpanRecorder()
    with tracing.start_request_span(recorder.tracer, scope):
        pass
    assert recorder.span.parent_id == ""


def test_client_trace_is_not_passed_on_without_a_collector() -> None:
    with tracing.start_request_span(NOOP_TRACER, make_http_scope(headers={"traceparent": SAMPLED})):
        assert tracing.trace_headers() == {}


async def test_trace_id_is_logged_without_a_collector() -> None:
    assert (await read_bound_context(NOOP_TRACER, traceparent=UNSAMPLED))["trace_id"] == TRACE
    assert "trace_id" not in await read_bound_context(NOOP_TRACER)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
async def test_probes_are_not_recorded(path: str) -> None:
    recorder = SpanRecorder()
    await send_request(recorder.tracer, path, headers={"traceparent": SAMPLED})
    assert recorder.spans == []


async def test_requests_are_not_nested() -> None:
    """A server may start a request in the context of another on the same connection."""
    recorder = SpanRecorder()
    with (
        tracing.start_request_span(recorder.tracer, make_http_scope()),
        tracing.start_request_span(recorder.tracer, make_http_scope()),
    ):
        pass
    first, second = recorder.spans
    assert first.trace_id != second.trace_id
    assert first.parent_id == second.parent_id == ""
