"""Request ids, access log and request metrics."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, cast

import pytest
import structlog
from litestar import Litestar, Request, Response, get
from litestar.params import FromPath
from litestar.response import Stream
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from service.api import asgi
from service.api.asgi import RequestMiddleware
from service.api.errors import ClientDisconnected, exception_handlers
from service.domain.errors import NotFound
from service.telemetry.logging import upstream_wait
from service.telemetry.metrics import Metrics, Port
from tests.unit.asgi_client import (
    App,
    AsgiResponse,
    call_app,
    make_http_scope,
    make_receive,
    open_raw_connection,
    serve_on_port,
)


@get("/things/{thing:str}")
async def thing(request: Request[Any, Any, Any], thing: FromPath[str]) -> Response[str]:
    request.scope["state"]["tenant"] = "demo"
    match thing:
        case "missing":
            raise NotFound("No such thing.")
        case "crash":
            raise ZeroDivisionError
        case "left":
            raise ClientDisconnected
        case _:
            bound = structlog.contextvars.get_contextvars()["request_id"]
            return Response(bound, headers={"X-Request-Id": "mine"})


@get("/torn")
async def torn() -> Stream:
    async def body() -> Any:
        yield b"half"
        raise ZeroDivisionError

    return Stream(body())


class ObservedApp:
    """An application behind the middleware, with its log events and metrics."""

    def __init__(self, app: App | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        logger = structlog.wrap_logger(
            None, processors=[self._collect], wrapper_class=structlog.make_filtering_bound_logger("INFO")
        )
        handlers: dict[Any, Any] = dict(exception_handlers(logger))
        self._metrics = Metrics(CollectorRegistry())
        inner: Any = app or Litestar(
            [thing, torn], exception_handlers=handlers, openapi_config=None, logging_config=None
        )
        self.app: App = RequestMiddleware(inner, self._metrics, logger, Port.TENANTS)

    def _collect(self, _logger: object, method: str, event: Any) -> Any:
        self.events.append({"level": method, **structlog.contextvars.merge_contextvars(None, method, event)})
        raise structlog.DropEvent

    @property
    def access_line(self) -> dict[str, Any]:
        (line,) = [event for event in self.events if event["event"] == "request.ended"]
        return line

    def samples(self, name: str) -> dict[tuple[str, str, str], float]:
        body, _ = self._metrics.render()
        return {
            (
                sample.labels.get("method", ""),
                sample.labels.get("route", ""),
                sample.labels.get("status", ""),
            ): sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
            if sample.name == name and sample.value
        }


async def send_request(watched: ObservedApp, path: str, method: str = "GET", **headers: str) -> AsgiResponse:
    response = await call_app(
        watched.app, method, path, headers={name.replace("_", "-"): headers[name] for name in headers}
    )
    assert response is not None
    return response


async def test_request_is_logged_once_without_its_query() -> None:
    watched = ObservedApp()
    await send_request(watched, "/things/one?key=hunter2")
    line = watched.access_line
    assert 0 <= line.pop("seconds") < 10
    assert len(line.pop("request_id")) == 32
    assert line == {
        "level": "info",
        "event": "request.ended",
        "port": "tenants",
        "method": "GET",
        "route": "/things/{thing}",
        "path": "/things/one",
        "status": 200,
        "upstream_seconds": None,
        "tenant": "demo",
        "outcome": "answered",
    }


async def test_context_variables_are_logged() -> None:
    watched = ObservedApp()
    with structlog.contextvars.bound_contextvars(trace_id="t1"):
        await send_request(watched, "/things/one")
    assert watched.access_line["trace_id"] == "t1"


async def test_upstream_wait_is_logged() -> None:
    async def wait() -> None:
        with upstream_wait():
            await asyncio.sleep(0)

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await asyncio.gather(wait(), wait())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    watched = ObservedApp(app)
    await send_request(watched, "/")
    assert 0 < watched.access_line["upstream_seconds"] <= watched.access_line["seconds"]


@pytest.mark.parametrize(
    ("method", "path", "route", "status", "outcome"),
    [
        ("GET", "/things/one", "/things/{thing}", 200, "answered"),
        ("GET", "/things/missing", "/things/{thing}", 404, "not-found"),
        ("GET", "/things/crash", "/things/{thing}", 500, "internal-error"),
        ("GET", "/nowhere", "unmatched", 404, "not-found"),
        ("DELETE", "/torn", "unmatched", 405, "method-not-allowed"),
    ],
)
async def test_all_outcomes_are_counted_and_logged(
    method: str, path: str, route: str, status: int, outcome: str
) -> None:
    watched = ObservedApp()
    response = await send_request(watched, path, method)
    line = watched.access_line
    assert response.status == status
    assert (line["route"], line["status"], line["outcome"]) == (route, status, outcome)
    assert watched.samples("gateway_http_requests_total") == {(method, route, str(status)): 1}
    assert watched.samples("gateway_http_request_duration_seconds_count") == {(method, route, ""): 1}
    assert watched.samples("gateway_http_requests_in_progress") == {}


@pytest.mark.parametrize("path", ["/things/one", "/things/missing", "/things/crash", "/nowhere"])
async def test_valid_request_id_is_kept(path: str) -> None:
    watched = ObservedApp()
    sent = make_http_scope("GET", path, {"x-request-id": "Req.1_a-b"})
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    await watched.app(sent, make_receive([{"type": "http.request", "body": b"", "more_body": False}]), send)
    assert [value for name, value in messages[0]["headers"] if name.lower() == b"x-request-id"] == [b"Req.1_a-b"]
    assert watched.access_line["request_id"] == "Req.1_a-b"
    if messages[0]["status"] >= 400:
        assert json.loads(messages[1]["body"])["instance"] == "Req.1_a-b"


@pytest.mark.parametrize("request_id", ["", "a b", "a" * 129, "x\r\ny", "{}", "é"])
async def test_invalid_request_id_is_replaced(request_id: str) -> None:
    response = await send_request(ObservedApp(), "/things/one", x_request_id=request_id)
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])
    assert response.body.decode() == response.headers["x-request-id"]


async def test_requests_do_not_share_state() -> None:
    """The server may reuse one scope object."""
    watched = ObservedApp()
    shared: dict[str, Any] = {"pool": 1}
    for path in ("/things/one", "/nowhere"):
        scope = make_http_scope("GET", path) | {"state": shared}
        await watched.app(scope, make_receive([]), ignore_messages)
    assert [event.get("tenant") for event in watched.events if event["event"] == "request.ended"] == ["demo", None]
    assert shared == {"pool": 1}


async def ignore_messages(_: Any) -> None:
    """Ignore all messages."""


async def test_paths_are_encoded_in_the_log() -> None:
    watched = ObservedApp()
    await send_request(watched, "/nowhere\n{}\x1b" + "x" * 1000)
    assert watched.access_line["path"].startswith("/nowhere%0A%7B%7D%1Bxxx")
    assert len(watched.access_line["path"]) == 500


async def test_client_disconnect_is_499() -> None:
    watched = ObservedApp()
    assert await call_app(watched.app, "GET", "/things/left") is None
    assert (watched.access_line["status"], watched.access_line["outcome"]) == (499, "client-disconnected")
    assert watched.samples("gateway_http_requests_total") == {("GET", "/things/{thing}", "499"): 1}
    assert [event["event"] for event in watched.events] == ["request.ended"]


async def test_error_outside_the_handlers_is_a_problem() -> None:
    async def broken(_scope: Any, _receive: Any, _send: Any) -> None:
        raise ZeroDivisionError

    watched = ObservedApp(broken)
    response = await send_request(watched, "/")
    assert (response.status, response.headers["content-type"]) == (500, "application/problem+json")
    assert response.json()["instance"] == response.headers["x-request-id"]
    crash, line = watched.events
    assert (crash["event"], crash["request_id"], crash["exc_info"]) == ("request.error", line["request_id"], True)
    assert (line["status"], line["outcome"], line["route"]) == (500, "internal-error", "unmatched")


async def test_cancelled_request_is_logged() -> None:
    async def endless(_scope: Any, _receive: Any, _send: Any) -> None:
        await asyncio.get_running_loop().create_future()

    watched = ObservedApp(endless)
    request = asyncio.create_task(call_app(watched.app))
    await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert watched.access_line["status"] == 499


def test_refused_requests_are_logged_once_per_address_and_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = ObservedApp()
    refuse = cast("RequestMiddleware", watched.app).refuse
    for client in ("192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.1"):
        refuse(400, "Nonsense.", client)
    assert [(event["event"], event["client"]) for event in watched.events] == [
        ("request.refused", "192.0.2.1"),
        ("request.refused", "192.0.2.2"),
    ]
    monkeypatch.setattr(asgi, "REFUSAL_LOG_SECONDS", 0)
    refuse(400, "Nonsense.", "192.0.2.1")
    assert len(watched.events) == 3
    for number in range(3_000):
        refuse(400, "Nonsense.", str(number))
    assert len(cast("RequestMiddleware", watched.app)._refusal_logged_at) <= 1_000


async def test_lifespan_passes_through() -> None:
    calls: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        calls.append((scope, receive, send))

    watched = ObservedApp(app)
    arguments: tuple[Any, Any, Any] = {"type": "lifespan"}, make_receive([]), ignore_messages
    await watched.app(*arguments)
    assert calls == [arguments]
    assert watched.events == []


async def test_broken_response_closes_the_connection() -> None:
    watched = ObservedApp()
    async with serve_on_port(watched.app) as port, open_raw_connection(port) as (reader, writer):
        writer.write(b"GET /torn HTTP/1.1\r\nHost: x\r\n\r\n")
        received = await reader.read()
    assert b"200 OK" in received
    assert not received.endswith(b"0\r\n\r\n")
    assert (watched.access_line["status"], watched.access_line["outcome"]) == (200, "internal-error")
    assert "request.error" in [event["event"] for event in watched.events]
