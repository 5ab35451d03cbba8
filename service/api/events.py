"""The changes of a task as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, get
from litestar.di import NamedDependency
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, PathParameter
from litestar.response.base import ASGIResponse
from litestar.types import HTTPResponseBodyEvent, HTTPResponseStartEvent, Receive, Scope, Send

from service.api import openapi
from service.api.auth import Tenants
from service.api.leaving import held_open
from service.api.problems import OUTCOME
from service.api.uploads import ClientLeft
from service.api.views import TaskView, task_view
from service.domain.errors import Unauthenticated
from service.domain.tasks import State
from service.domain.tenants import Tenant
from service.usecases.task_cache import Seen
from service.usecases.task_status import Follow

MEDIA_TYPE = "text/event-stream"
LONGEST_SECONDS = 600.0
"""A stream ends after so long, and its client comes again: its token is looked at anew, on whatever process it gets."""
WRITE_SECONDS = 30.0
"""A client that takes nothing for so long is cut off. No more than one event waits for it."""
_RETRY_MILLISECONDS = 1_000
_NO_STORE = {"Cache-Control": "no-store"}
# Proxies of the kind of nginx hold streams back unless they are told not to.
_HEADERS = {"content-type": MEDIA_TYPE, "X-Accel-Buffering": "no"} | _NO_STORE
_HEARTBEAT = b":\n\n"
_ID = re.compile(rf"([0-9]{{1,9}})-({'|'.join(State)})")

_DESCRIPTION = (
    "An event `state` with the task as it is now, one for each change, and the end of the stream with the end of the "
    "task: whoever reads it to its end and finds the task in `succeeded` or `failed` is done. Comments come every 15 "
    "seconds. After 10 minutes the stream ends, and so it does when the gateway is restarted: come again with "
    "`Last-Event-ID`, as an `EventSource` does by itself, and you are told only what you do not know."
)
_LAST_EVENT_ID = "The `id` of the last event you got. After the last one of a task the answer is 204."
_RESPONSES = {204: ResponseSpec(None, description="You know the end of the task.", generate_examples=False)}


def event_routes(*, follow: Follow, tenants: Tenants) -> Sequence[HTTPRouteHandler]:
    """The handler under `/v1/tasks/{id}/events`."""

    @get(
        "/tasks/{task_id:str}/events",
        operation_id="follow-task",
        summary="Follow a task",
        description=_DESCRIPTION,
        media_type=MEDIA_TYPE,
        response_description="The task, again and again",
        response_headers=openapi.headers("Cache-Control"),
        responses=openapi.problems(401, 404, "overloaded", "upstream-unavailable") | _RESPONSES,
    )
    async def events(
        request: Request[Any, Any, Any],
        tenant: NamedDependency[Tenant],
        task_id: Annotated[str, PathParameter(description="The `id` of the task.")],
        last: Annotated[str | None, HeaderParameter(name="Last-Event-ID", description=_LAST_EVENT_ID)] = None,
    ) -> Response[str | None]:
        version, state = _parsed(last or "")
        if state and state.ended:
            follow.reference(tenant, task_id)
            return Response(None, status_code=204, headers=_NO_STORE)
        changes = follow.changes(tenant, task_id, after=version, seconds=LONGEST_SECONDS)
        return _Answer(_Stream(request, changes, lambda: tenants.by_request(request)))

    return [events]


def event(view: TaskView, version: int) -> bytes:
    """A version of a task as an event. Its id tells a client that comes again with it whether that was the end."""
    return b"event: state\nid: %d-%s\ndata: %s\n\n" % (version, view.state.encode(), msgspec.json.encode(view))


def _parsed(last: str) -> tuple[int, State | None]:
    """The version and the state that a client knows, by the id of the last event it got; -1 if it knows none."""
    found = _ID.fullmatch(last)
    return (int(found[1]), State(found[2])) if found else (-1, None)


class _Stuck(Exception):
    """The client does not take what it is sent."""


class _Stream(ASGIResponse):
    """Sends changes for as long as `check` lets it, which raises Unauthenticated. A client that leaves ends it at once.

    Errors of the first look at the task are raised before anything is sent.
    """

    _should_set_content_length = False

    def __init__(
        self, request: Request[Any, Any, Any], changes: AsyncGenerator[Seen | None, None], check: Callable[[], object]
    ) -> None:
        super().__init__(headers=_HEADERS)
        self._request = request
        self._changes = changes
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request that this was made for."""
        del receive  # the request reads it
        try:
            await held_open(self._request, self._send(send))
        except ClientLeft:
            scope["state"][OUTCOME] = "client-left"
        except _Stuck:  # returning without an end makes the server close the connection
            scope["state"][OUTCOME] = "client-stuck"

    async def _send(self, send: Send) -> None:
        async with aclosing(self._changes) as changes:
            first = await anext(changes)
            await _within(send, {"type": "http.response.start", "status": 200, "headers": self.encode_headers()})
            # Those that an ending process leaves do not all come again in the same moment.
            retry = b"retry: %d\n" % (_RETRY_MILLISECONDS + secrets.randbelow(2 * _RETRY_MILLISECONDS))
            await _write(send, retry + _encoded(first))
            async for change in changes:
                try:
                    self._check()
                except Unauthenticated:
                    break
                await _write(send, _encoded(change))
        await _write(send, b"", more=False)


class _Answer(Response[str | None]):
    """A stream as handlers give it."""

    def __init__(self, stream: _Stream) -> None:
        super().__init__(None)
        self._stream = stream

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIResponse:
        """The stream itself."""
        return self._stream


def _encoded(change: Seen | None) -> bytes:
    return event(task_view(change.task), change.task.version) if change else _HEARTBEAT


async def _write(send: Send, body: bytes, *, more: bool = True) -> None:
    await _within(send, {"type": "http.response.body", "body": body, "more_body": more})


async def _within(send: Send, message: HTTPResponseStartEvent | HTTPResponseBodyEvent) -> None:
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await send(message)
    except TimeoutError:
        raise _Stuck from None
