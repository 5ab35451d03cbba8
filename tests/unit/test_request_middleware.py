"""Access log, metrics and span of requests."""

from __future__ import annotations

from typing import Any, cast

import pytest
import structlog
from litestar import Litestar, Request, Response, get
from litestar.exceptions import ImproperlyConfiguredException, PermissionDeniedException
from litestar.params import FromPath
from litestar.response import Stream
from prometheus_client import CollectorRegistry
from structlog.testing import LogCapture

from service.api import asgi
from service.api.asgi import RequestMiddleware
from service.api.errors import OUTCOME, ClientDisconnected, exception_handlers
from service.domain.errors import NotFound, UpstreamFault
from service.telemetry.metrics import Metrics, Port
from tests.support.network import serve_app
from tests.support.traces import SPAN, TRACE, SpanRecorder
from tests.unit.asgi_client import App, call_app, make_http_scope, make_receive, open_raw_connection

ADMIN_TOKEN = "the-token-of-the-operators"


@get("/things/{thing:str}")
async def thing(request: Request[Any, Any, Any], thing: FromPath[str]) -> Response[str]:
    request.scope["state"]["tenant"] = "demo"
    errors: dict[str, Exception] = {
        "missing": NotFound("No such thing."),
        "crash": ZeroDivisionError("hunter2"),
        "unmapped": UpstreamFault("hunter2"),
        "framework": ImproperlyConfiguredException("hunter2"),
        "forbidden": PermissionDeniedException("hunter2"),
        "left": ClientDisconnected(),
    }
    if error := errors.get(thing):
        raise error
    if thing in {"transfer-aborted", "client-too-slow"}:
        request.scope["state"][OUTCOME] = thing
    return Response("")


@get("/torn")
async def torn() -> Stream:
    async def body() -> Any:
        yield b"half"
        raise ZeroDivisionError

    return Stream(body())


class ObservedApp:
    """An application behind the middleware, with its log events, metrics and spans."""

    def __init__(self, app: App | None = None, recorder: SpanRecorder | None = None) -> None:
        self.recorder = recorder or SpanRecorder(secrets=[ADMIN_TOKEN])
        processors = [structlog.contextvars.merge_contextvars, capture := LogCapture()]
        level = structlog.make_filtering_bound_logger("INFO")
        logger = structlog.wrap_logger(None, processors=processors, wrapper_class=level)
        self.events = capture.entries
        handlers: dict[Any, Any] = dict(exception_handlers(logger))
        self.registry = CollectorRegistry()
        inner: Any = app or Litestar(
            [thing, torn], exception_handlers=handlers, openapi_config=None, logging_config=None
        )
        self.app: App = RequestMiddleware(inner, Metrics(self.registry), logger, Port.TENANTS, self.recorder.tracer)

    @property
    def access_event(self) -> dict[str, Any]:
        (event,) = [event for event in self.events if event["event"] == "request.ended"]
        return event

    def count_requests(self, method: str, route: str, status: int) -> float | None:
        labels = {"port": "tenants", "method": method, "route": route, "status": str(status)}
        return self.registry.get_sample_value("gateway_http_requests_total", labels)


CRASH = "/things/{thing}", 500, "internal-error", "internal-error"


@pytest.mark.parametrize(
    ("method", "path", "route", "status", "outcome", "error"),
    [
        ("GET", "/things/one?key=hunter2", "/things/{thing}", 200, "answered", None),
        ("GET", "/things/missing", "/things/{thing}", 404, "not-found", None),
        *(("GET", f"/things/{crash}", *CRASH) for crash in ("crash", "unmapped", "framework")),
        ("GET", "/things/forbidden", "/things/{thing}", 403, "forbidden", None),
        ("GET", "/nowhere", "unmatched", 404, "not-found", None),
        ("DELETE", "/torn", "unmatched", 405, "method-not-allowed", None),
        ("GET", "/things/left", "/things/{thing}", 499, "client-disconnected", None),
        ("GET", "/things/transfer-aborted", "/things/{thing}", 200, "transfer-aborted", "transfer-aborted"),
        ("GET", "/things/client-too-slow", "/things/{thing}", 200, "client-too-slow", None),
    ],
)
async def test_every_request_is_counted_logged_and_recorded_once(
    method: str, path: str, route: str, status: int, outcome: str, error: str | None
) -> None:
    observed = ObservedApp()
    response = await call_app(observed.app, method, path, headers={"Authorization": "Bearer hunter2"})
    event, span = observed.access_event, observed.recorder.span
    tenant = None if route == "unmatched" else "demo"
    fields = ("method", "path", "route", "tenant", "status", "outcome")
    expected = [method, path.partition("?")[0], route, tenant, status, outcome]
    assert [event[field] for field in fields] == expected
    if response:
        assert (response.status, response.headers["x-request-id"]) == (status, event["request_id"])
        assert b"hunter2" not in response.body
    assert "hunter2" not in str((event, span))
    causes = [event for event in observed.events if event["event"] == "request.error"]
    assert len(causes) == (status == 500)
    assert all("hunter2" in str(cause["exc_info"]) for cause in causes)
    assert observed.count_requests(method, route, status) == 1
    names = ("http.response.status_code", "gateway.outcome", "gateway.tenant", "error.type")
    assert [span.attributes.get(name) for name in names] == [status if response else None, outcome, tenant, error]
    assert (span.is_error, span.status_message, span.event_count) == (error is not None, "", 0)
    assert (span.name, span.kind) == (method if tenant is None else f"{method} {route}", "server")
    assert event["trace_id"] == span.trace_id


async def test_texts_of_clients_are_cut_and_no_span_names() -> None:
    observed = ObservedApp()
    await call_app(observed.app, "GET", "/\n{}\x1b" + "x" * 470 + ADMIN_TOKEN)
    assert observed.access_event["path"].startswith("/%0A%7B%7D%1Bxxx")
    assert len(observed.access_event["path"]) == 500
    await call_app(observed.app, "BREW", "/things/one")
    unmatched, unknown = observed.recorder.spans
    assert len(unmatched.attributes["url.path"]) <= 500
    assert ADMIN_TOKEN[:19] not in str(unmatched)
    assert unknown.name.split()[0] == "HTTP"
    assert unknown.attributes["http.request.method"] == "_OTHER"


async def test_sampling_follows_the_parent() -> None:
    for share, sampled in ((0.0, "01"), (1.0, "00")):
        observed = ObservedApp(recorder=SpanRecorder(share=share))
        await call_app(observed.app, headers={"traceparent": f"00-{TRACE}-{SPAN}-{sampled}"})
        assert observed.access_event["trace_id"] == TRACE
        parents = [(span.trace_id, span.parent_id) for span in observed.recorder.spans]
        assert parents == ([(TRACE, SPAN)] if sampled == "01" else [])


async def test_requests_do_not_share_state() -> None:
    # The server may reuse one scope object.
    async def ignore(_: Any) -> None:
        pass

    observed = ObservedApp()
    shared: dict[str, Any] = {"pool": 1}
    for path in ("/things/one", "/nowhere"):
        await observed.app(make_http_scope("GET", path) | {"state": shared}, make_receive([]), ignore)
    assert [event.get("tenant") for event in observed.events if event["event"] == "request.ended"] == ["demo", None]
    assert shared == {"pool": 1}


async def test_error_outside_the_handlers_is_a_problem() -> None:
    async def broken(_scope: Any, _receive: Any, _send: Any) -> None:
        raise ZeroDivisionError

    observed = ObservedApp(broken)
    response = await call_app(observed.app)
    assert response
    assert (response.status, response.headers["content-type"]) == (500, "application/problem+json")
    crash, event = observed.events
    assert (crash["event"], crash["exc_info"]) == ("request.error", True)
    assert response.json()["instance"] == crash["request_id"] == event["request_id"]
    assert (event["status"], event["outcome"]) == (500, "internal-error")


def test_refused_requests_are_logged_once_per_address_and_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    observed = ObservedApp()
    middleware = cast("RequestMiddleware", observed.app)
    for client in ("192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.1"):
        middleware.refuse(400, "Nonsense.", client)
    assert [event["client"] for event in observed.events] == ["192.0.2.1", "192.0.2.2"]
    monkeypatch.setattr(asgi, "REFUSAL_LOG_SECONDS", 0)
    middleware.refuse(400, "Nonsense.", "192.0.2.1")
    assert len(observed.events) == 3
    for number in range(1_500):
        middleware.refuse(400, "Nonsense.", str(number))
    assert len(middleware._refusal_logged_at) <= 1_000
    assert observed.count_requests("other", "unmatched", 400) == 1_505


async def test_broken_response_closes_the_connection() -> None:
    observed = ObservedApp()
    async with serve_app(observed.app) as url, open_raw_connection(int(url.rpartition(":")[2])) as (reader, writer):
        writer.write(b"GET /torn HTTP/1.1\r\nHost: x\r\n\r\n")
        received = await reader.read()
    assert b"200 OK" in received
    assert not received.endswith(b"0\r\n\r\n")
    assert (observed.access_event["status"], observed.access_event["outcome"]) == (200, "internal-error")
    assert "request.error" in [event["event"] for event in observed.events]
