"""ASGI middleware: request ids, access log, metrics, HEAD, and cancellation when the client disconnects.

The middleware wraps Litestar because unknown paths, unknown methods and crashes never reach Litestar's own middleware.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, MutableMapping
from typing import Any, TypeVar
from urllib.parse import quote

from litestar import Request
from opentelemetry.trace import INVALID_SPAN, NoOpTracer, Span, Tracer
from structlog.contextvars import bind_contextvars
from structlog.typing import FilteringBoundLogger
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from service.api import errors
from service.domain.errors import GatewayError
from service.domain.hosts import IpNetwork
from service.http_protocol import CLIENT_TOO_SLOW
from service.telemetry import logging, tracing
from service.telemetry.logging import OUTCOME_ANSWERED
from service.telemetry.metrics import OTHER_LABEL, UNMATCHED_ROUTE, Metrics, Port
from service.telemetry.redaction import SafeText

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]
"""An ASGI application. Each library types the three parameters in its own way."""

T = TypeVar("T")

TENANT = "tenant"
TOKEN_ID = "token_id"  # noqa: S105 - a key
OPERATOR = "operator"
LONG_LIVED = "held"
IS_PATH_SAFE = "is_path_safe"
"""Keys in the state of an ASGI scope: the tenant's name, the id of its token, the operator's name, a mark of requests
that last long on purpose, and one of a path that consists of a route and an id which the gateway has decrypted."""
HEAD_KEY = "imaging_gateway.head"
"""Key in an ASGI scope: the request is a HEAD, so no content needs to be made."""

CLIENT_DISCONNECTED_STATUS = 499
"""Logged and counted for a request whose client disconnected before a response was sent."""
REFUSAL_LOG_SECONDS = 60.0
"""Refused requests of one address are logged at most once in this time."""

_MAX_PATH_CHARS = 4 * logging.MAX_PATH_CHARS
"""Passed to the log, which cuts a path once it is redacted."""
_MAX_LOGGED_ADDRESSES = 1_000
_MAX_ADDRESS_CHARS = 45
_REQUEST_ID_HEADER = b"x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_ALLOW_HEADER = b"allow"
_STATUSES_WITH_ALLOW = (204, 405)
"""Of responses to OPTIONS and to unknown methods."""
_NOSNIFF = (b"x-content-type-options", b"nosniff")
"""Header of every response: a browser must not take JSON or an image for a script or a page."""


async def run_until_disconnect(
    request: Request[Any, Any, Any], work: Coroutine[Any, Any, T], refusal: asyncio.Future[GatewayError]
) -> T:
    """Return the result of `work`, which is cancelled if the client disconnects first, or if `refusal` is done.

    The body of the request must have been read. Raises ClientDisconnected, or the refusal.
    """
    request.scope["state"][LONG_LIVED] = True
    running = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((running, disconnect, refusal), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise refusal.result() if refusal.done() else errors.ClientDisconnected
    finally:
        for future in (running, disconnect):
            future.cancel()
        await asyncio.gather(running, disconnect, return_exceptions=True)
        del running, future  # they hold their error, whose traceback holds this frame


async def _wait_for_disconnect(request: Request[Any, Any, Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def disconnect_outcome(scope: Any) -> str:
    return "client-too-slow" if CLIENT_TOO_SLOW in scope else "client-disconnected"


class RequestMiddleware:
    """Gives every request of one port an id, a log line and its place in the metrics.

    A request of one of the `trusted_proxies` is that of the last client before them in `X-Forwarded-For`.
    """

    def __init__(
        self,
        app: App,
        metrics: Metrics,
        logger: FilteringBoundLogger,
        port: Port,
        tracer: Tracer = tracing.NOOP_TRACER,
        trusted_proxies: Collection[IpNetwork] = (),
    ) -> None:
        self._app = app
        self._handle: Any = self._handle_request
        if trusted_proxies:
            self._handle = ProxyHeadersMiddleware(self._handle, [str(network) for network in trusted_proxies])
        self._metrics = metrics
        self._logger = logger.bind()  # a logger of structlog that is not bound is bound anew for each event
        self._port = str(port.value)  # `.value` of an enum is computed at each access
        self._tracer = tracer
        self._is_tracing = not isinstance(tracer, NoOpTracer)
        self._refusal_logged_at: dict[str, float] = {}

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        return (self._handle if scope["type"] == "http" else self._app)(scope, receive, send)

    async def _handle_request(self, scope: Any, receive: Any, send: Any) -> None:
        sent_id, is_traced = b"", self._is_tracing
        for name, value in scope["headers"]:
            if name == _REQUEST_ID_HEADER:
                sent_id = sent_id or value
            elif name == tracing.PARENT_HEADER:
                is_traced = True
        text = sent_id.decode("latin-1")
        recorder = _ResponseRecorder(send, text) if _REQUEST_ID.fullmatch(text) else _ResponseRecorder(send)
        if is_traced:
            with tracing.start_request_span(self._tracer, scope) as span:
                await self._serve(scope, receive, recorder, span)
        else:
            await self._serve(scope, receive, recorder, INVALID_SPAN)

    def refuse(self, status: int, detail: str, client: str) -> tuple[Iterable[tuple[bytes, bytes]], bytes]:
        """Return the headers and body that refuse a request which the server can't parse; count it, log a sample."""
        request_id = _new_request_id()
        self._metrics.record_request(self._port, OTHER_LABEL, UNMATCHED_ROUTE, status, 0)
        now, logged_at = time.monotonic(), self._refusal_logged_at
        if now - logged_at.get(client, -math.inf) >= REFUSAL_LOG_SECONDS:
            logged_at.pop(client, None)  # keeps the newest last
            if len(logged_at) >= _MAX_LOGGED_ADDRESSES:
                del logged_at[next(iter(logged_at))]
            logged_at[client] = now
            self._logger.warning(
                "request.refused", client=client, status=status, detail=detail, port=self._port, request_id=request_id
            )
        kind = errors.HEADERS_TOO_LARGE if status == errors.HEADERS_TOO_LARGE.status else errors.MALFORMED_REQUEST
        _, headers, body = errors.render(errors.ProblemResponse(kind, detail), request_id)
        fields = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        return [*fields, (_REQUEST_ID_HEADER, request_id.encode()), _NOSNIFF], body

    async def _serve(self, scope: Message, receive: Receive, recorder: _ResponseRecorder, span: Span) -> None:
        # Read now: Litestar changes it.
        method, path, request_id = scope["method"], scope["path"], recorder.request_id
        # The server may share one state among all requests.
        state = scope["state"] = {**scope.get("state", {}), errors.REQUEST_ID: request_id}
        trace_id = tracing.trace_id_of(span)
        # The server runs each request in a context of its own.
        bind_contextvars(request_id=request_id, **({"trace_id": trace_id} if trace_id else {}))
        started_at = time.perf_counter()
        self._metrics.requests_in_progress[self._port] += 1
        with logging.WaitTimer() as upstream_wait:
            try:
                await self._app(scope, receive, recorder.send)
            except errors.ClientDisconnected:
                state[errors.OUTCOME] = disconnect_outcome(scope)
            except Exception:
                self._logger.exception("request.error")
                state[errors.OUTCOME] = errors.INTERNAL_ERROR_RESPONSE.type.code
                # Once a response has started, returning without its end makes the server close the connection.
                if recorder.status is None:
                    await recorder.send_internal_error()
            finally:
                seconds = time.perf_counter() - started_at
                self._metrics.requests_in_progress[self._port] -= 1
                status = recorder.status or CLIENT_DISCONNECTED_STATUS
                route = scope.get("path_template") or UNMATCHED_ROUTE
                outcome, tenant = state.get(errors.OUTCOME, OUTCOME_ANSWERED), state.get(TENANT)
                tracing.record_request_end(
                    span, method, recorder.status, route=scope.get("path_template"), outcome=outcome, tenant=tenant
                )
                self._metrics.record_request(self._port, method, route, status, seconds, is_stream=LONG_LIVED in state)
                waited = upstream_wait.seconds
                self._logger.info(
                    "request.ended",
                    method=method,
                    path=SafeText(path) if IS_PATH_SAFE in state or path == route else quote(path)[:_MAX_PATH_CHARS],
                    status=status,
                    seconds=round(seconds, 6),
                    upstream_seconds=None if waited is None else round(waited, 6),
                    client=scope["client"][0][:_MAX_ADDRESS_CHARS] if scope["client"] else None,
                    tenant=tenant,
                    token_id=state.get(TOKEN_ID),
                    outcome=outcome,
                    route=route,
                    port=self._port,
                    request_id=request_id if recorder.has_sent_id else SafeText(request_id),
                    trace_id=trace_id,
                    operator=state.get(OPERATOR),
                )


def _new_request_id() -> str:
    # Unique, but no secret, so that it needs no system call.
    return f"{random.getrandbits(128):032x}"


class _ResponseRecorder:
    """Sends the messages of a response and records its status."""

    __slots__ = ("_send", "has_sent_id", "request_id", "status")

    def __init__(self, send: Send, sent_id: str | None = None) -> None:
        self._send = send
        self.has_sent_id = sent_id is not None
        self.request_id = sent_id or _new_request_id()
        self.status: int | None = None

    def send(self, message: Message) -> Awaitable[None]:
        """Send a message of the application, with the request's id and `nosniff` in the headers."""
        if message["type"] == "http.response.start":
            headers = [header for header in message.get("headers", ()) if header[0].lower() != _REQUEST_ID_HEADER]
            message["headers"] = [*headers, (_REQUEST_ID_HEADER, self.request_id.encode()), _NOSNIFF]
            self.status = message["status"]
        return self._send(message)

    async def send_internal_error(self) -> None:
        """Respond in place of an application that failed before its response started."""
        status, headers, body = errors.render(errors.INTERNAL_ERROR_RESPONSE, self.request_id)
        fields = {**headers, "Content-Length": str(len(body))}
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(name.lower().encode(), value.encode()) for name, value in fields.items()],
            }
        )
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


class HeadMiddleware:
    """Serves HEAD for an application that only has GET: the same headers without content (RFC 9110).

    `methods` are those of each path template: Litestar's response to OPTIONS names only those of the handler that was
    registered first (its issue 4169).
    """

    def __init__(self, app: App, methods: Mapping[str, Collection[str]]) -> None:
        self._app = app
        self._methods = methods

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        if scope["type"] != "http":
            return self._app(scope, receive, send)
        if scope["method"] == "HEAD":
            return self._serve_head(scope, receive, send)

        def send_allow(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start" and message["status"] in _STATUSES_WITH_ALLOW:
                self._complete_allow(scope, message)
            return send(message)  # type: ignore[no-any-return]

        return self._app(scope, receive, send_allow)

    async def _serve_head(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._complete_allow(inner, message)
                await send(message)
                # Sent at once: a stream may take long or never end.
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        # The server keeps its own scope, which shows it that no content may follow.
        inner = {**scope, "method": "GET", HEAD_KEY: True}
        try:
            await self._app(inner, receive, send_head)
        finally:
            if "path_template" in inner:
                scope["path_template"] = inner["path_template"]

    def _complete_allow(self, scope: Message, message: Message) -> None:
        methods = self._methods.get(scope.get("path_template", ""), ())
        message["headers"] = [_complete_allow(name, value, methods) for name, value in message["headers"]]


def _complete_allow(name: bytes, value: bytes, methods: Collection[str]) -> tuple[bytes, bytes]:
    if name.lower() != _ALLOW_HEADER:
        return name, value
    allowed = {*methods, *(part.strip() for part in value.decode().split(","))}
    return name, ", ".join(sorted(allowed | {"HEAD"} if "GET" in allowed else allowed)).encode()
