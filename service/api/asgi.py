"""ASGI middleware: request ids, access log, metrics, HEAD, and cancellation when the client disconnects."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from typing import Any, TypeVar
from urllib.parse import quote
from uuid import uuid4

import structlog
from litestar import Request
from structlog.typing import FilteringBoundLogger

from service.api.errors import CRASHED, HEADERS_TOO_LARGE, MALFORMED, OUTCOME, REQUEST_ID, ClientLeft, Problem, render
from service.telemetry import logging
from service.telemetry.logging import ANSWERED, Spent
from service.telemetry.metrics import OTHER, UNMATCHED, Metrics, Port
from service.telemetry.tracing import UNTRACED, RequestSpan, Tracer

HELD = "held"
"""Where the state of an ASGI scope says that a request was held open on purpose, which tells nothing of our speed."""


T = TypeVar("T")


async def held_open(request: Request[Any, Any, Any], work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives, which may take its time and is cancelled if the client leaves before. Raises ClientLeft then.

    The body of the request has to be read already.
    """
    request.scope["state"][HELD] = True
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientLeft
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)
        del doing, task  # which hold their error, whose traceback holds this frame


async def _left(request: Request[Any, Any, Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


TENANT = "tenant"
"""Where the tenant's name stands in the state of an ASGI scope, once it is known."""


CLIENT_LEFT = 499
"""The status that logs and metrics show for a request whose client left before it was answered."""


Message = MutableMapping[str, Any]


Receive = Callable[[], Awaitable[Message]]


Send = Callable[[Message], Awaitable[None]]


App = Callable[[Any, Any, Any], Awaitable[None]]
"""An ASGI application; each library types the three in its own way, and the edge stands between all of them."""


_HEADER = b"x-request-id"


_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


_LONGEST_PATH = 500


REFUSAL_LOG_SECONDS = 60.0
"""Refused requests of one address are logged once in this time."""


_LOGGED_ADDRESSES = 1_000


class Edge:
    """Wraps an application that serves one port."""

    def __init__(
        self, app: App, metrics: Metrics, logger: FilteringBoundLogger, port: Port, tracer: Tracer = UNTRACED
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._logger = logger
        self._port = port
        self._tracer = tracer
        self._refusal_logged_at: dict[str, float] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection; what is not HTTP is passed through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # The server may share one state among all requests.
        state = scope["state"] = {**scope.get("state", {})}
        request_id = state[REQUEST_ID] = _request_id(scope)
        with self._tracer.request(scope) as span:
            names = {"request_id": request_id} | ({"trace_id": span.trace_id} if span.trace_id else {})
            with (
                structlog.contextvars.bound_contextvars(**names),
                logging.counted() as upstream,
                self._metrics.in_progress(self._port),
            ):
                await self._serve(scope, receive, _Answer(send, request_id), upstream, span)

    def refuse(self, status: int, detail: str, client: str) -> tuple[Iterable[tuple[bytes, bytes]], bytes]:
        """Make the problem document for a request that the server can't parse; count it, and log one of many."""
        request_id = uuid4().hex
        self._metrics.request(self._port, OTHER, UNMATCHED, status, 0)
        now, logged_at = time.monotonic(), self._refusal_logged_at
        if now - logged_at.get(client, -math.inf) >= REFUSAL_LOG_SECONDS:
            logged_at.pop(client, None)  # the newest are last
            if len(logged_at) >= _LOGGED_ADDRESSES:
                del logged_at[next(iter(logged_at))]
            logged_at[client] = now
            self._logger.warning(
                "request.refused", client=client, status=status, detail=detail, port=self._port, request_id=request_id
            )
        kind = HEADERS_TOO_LARGE if status == HEADERS_TOO_LARGE.status else MALFORMED
        _, headers, body = render(Problem(kind, detail), request_id)
        fields = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        return [*fields, (_HEADER, request_id.encode())], body

    async def _serve(
        self, scope: Message, receive: Receive, answer: _Answer, upstream: Spent, span: RequestSpan
    ) -> None:
        method, path = scope["method"], quote(scope["path"])[:_LONGEST_PATH]  # as Litestar changes the path
        state = scope["state"]
        begun = time.perf_counter()
        try:
            await self._app(scope, receive, answer.send)
        except ClientLeft:
            state[OUTCOME] = "client-left"
        except Exception:
            self._logger.exception("request.crashed")
            state[OUTCOME] = CRASHED.type.code
            # With an answer begun, returning without its end makes the server close the connection.
            if answer.status is None:
                await answer.crash()
        finally:
            seconds = time.perf_counter() - begun
            status = answer.status or CLIENT_LEFT
            route = scope.get("path_template") or UNMATCHED
            outcome, tenant = state.get(OUTCOME, ANSWERED), state.get(TENANT)
            span.answered(answer.status, route=scope.get("path_template"), outcome=outcome, tenant=tenant)
            self._metrics.request(self._port, method, route, status, seconds, held=HELD in state)
            self._logger.info(
                "request.ended",
                method=method,
                path=path,
                status=status,
                seconds=round(seconds, 6),
                upstream_seconds=None if upstream.seconds is None else round(upstream.seconds, 6),
                tenant=tenant,
                outcome=outcome,
                route=route,
                port=self._port,
            )


class _Answer:
    """What was answered so far."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        """Pass a message of the application on, with the request's id."""
        if message["type"] == "http.response.start":
            headers = [header for header in message.get("headers", ()) if header[0].lower() != _HEADER]
            message["headers"] = [*headers, (_HEADER, self._request_id.encode())]
            self.status = message["status"]
        await self._send(message)

    async def crash(self) -> None:
        """Answer in place of an application that failed before it began to."""
        status, headers, body = render(CRASHED, self._request_id)
        sent = {**headers, "Content-Length": str(len(body))}
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
            }
        )
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


def _request_id(scope: Message) -> str:
    """The id the client gave if it is one that can be told on, else a new one."""
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name == _HEADER), "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex


HEAD = "imaging_gateway.head"
"""Stands in the scope where only the head of the answer is wanted, so that no content need be made for it."""


_ALLOW = b"allow"


def answering_head(app: App) -> App:
    """Wrap an application that knows GET only."""

    async def answering(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        asked_for_head = scope["method"] == "HEAD"

        async def pass_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [_with_head(*header) for header in message["headers"]]
            elif asked_for_head and message["type"] == "http.response.body":
                return
            await send(message)
            if asked_for_head:
                # At once, since what is streamed may take its time or never end.
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        # The server keeps its own scope, by which it knows that no content may follow.
        inner = {**scope, "method": "GET", HEAD: True} if asked_for_head else scope
        try:
            await app(inner, receive, pass_on)
        finally:
            if "path_template" in inner:
                scope["path_template"] = inner["path_template"]

    return answering


def _with_head(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    """A header, and if it lists the methods allowed, with HEAD where it has GET."""
    methods = [each.strip() for each in value.split(b",")] if name.lower() == _ALLOW else []
    return (name, b", ".join([*methods, b"HEAD"])) if b"GET" in methods and b"HEAD" not in methods else (name, value)
