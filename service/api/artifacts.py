"""Handing out results: their bytes go through this process as they come, a few at a time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

from litestar import Request, Response, get
from litestar.datastructures import Headers
from litestar.di import NamedDependency
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, PathParameter
from litestar.response.base import ASGIResponse

from service.api import openapi
from service.api.asgi import HEAD, Send, held_open
from service.api.errors import OUTCOME, ClientLeft
from service.api.schemas import PRIVATE
from service.domain.media import EXTENSIONS
from service.domain.tasks import ArtifactName, Task
from service.domain.tenants import Tenant
from service.usecases.ports import Asked, BrokenOff, Fetched, Portion
from service.usecases.task_status import Fetch

READER_SECONDS = 60.0
"""A client that takes nothing for so long is given up, since it holds a connection to the upstream too."""

_DESCRIPTION = (
    "The bytes come through the gateway, from wherever the upstream keeps them, so that no other address has to be "
    "within your reach. Fetch them soon and keep them; the upstream may remove them some day. A connection that breaks "
    "off before the end says that this is not the whole: ask for the rest with `Range` and `If-Range`."
)
_RANGE = "One range of bytes, such as `bytes=1000-`. Several are not understood, and the whole is answered."
_STATUSES: Mapping[Portion, int] = {Portion.WHOLE: 200, Portion.PART: 206, Portion.NOTHING: 304}
_HEADERS = PRIVATE | {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
}

_ONE_RANGE = re.compile(r"bytes=(?:[0-9]{1,18}-[0-9]{0,18}|-[0-9]{1,18})")
_TAG = r'(?:W/)?"[!#-~]{0,200}"'
_TAGS = re.compile(rf"\*|{_TAG}(?:[ \t]*,[ \t]*{_TAG})*")
_DATE = re.compile(r"[A-Za-z0-9 ,:+-]{1,64}")
_TAG_OR_DATE = re.compile(rf"{_TAG}|{_DATE.pattern}")

Opening = AbstractAsyncContextManager[tuple[Task, Fetched]]


def routes(fetch: Fetch) -> list[HTTPRouteHandler]:
    """The handler under `/v1/tasks/{id}/artifacts`."""

    @get(
        "/tasks/{task_id:str}/artifacts/{name:str}",
        operation_id="read-artifact",
        summary="Fetch a result",
        description=_DESCRIPTION,
        response_description="The whole result",
        response_headers=openapi.headers(*openapi.FILE_HEADERS),
        responses=openapi.problems(401, 404, 416, "upstream-invalid-response", "upstream-unavailable", "overloaded")
        | openapi.NOT_MODIFIED
        | {206: ResponseSpec(bytes, description="The range of it that was asked for", generate_examples=False)},
    )
    async def read(
        request: Request[Any, Any, Any],
        tenant: NamedDependency[Tenant],
        task_id: Annotated[str, PathParameter(description="The `id` of the task.")],
        name: Annotated[
            str, PathParameter(description="Which of its `artifacts`.", schema_extra={"enum": list(ArtifactName)})
        ],
        range_: Annotated[str | None, HeaderParameter(name="Range", description=_RANGE)] = None,
        if_range: Annotated[
            str | None, HeaderParameter(name="If-Range", description="The `ETag` of what you have the beginning of.")
        ] = None,
        if_none_match: Annotated[
            str | None, HeaderParameter(name="If-None-Match", description="The `ETag` of what you have.")
        ] = None,
        if_modified_since: Annotated[
            str | None, HeaderParameter(name="If-Modified-Since", description="The `Last-Modified` of what you have.")
        ] = None,
    ) -> Response[bytes]:
        del range_, if_range, if_none_match, if_modified_since  # declared for the API's document
        wanted = _asked(request.headers, head=HEAD in request.scope)
        return _Download(request, fetch(tenant, task_id, name, wanted))

    return [read]


class _Download(Response[bytes]):
    """An answer that is opened only as it is sent, so that one block holds all that it keeps open."""

    def __init__(self, request: Request[Any, Any, Any], opening: Opening) -> None:
        super().__init__(b"")
        self._sending = _Sending(request, opening)

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIResponse:
        return self._sending


class _Sending(ASGIResponse):
    """Sends a result. What goes wrong before its first byte is raised, and answered as a problem."""

    def __init__(self, request: Request[Any, Any, Any], opening: Opening) -> None:
        super().__init__()
        self._request = request
        self._opening = opening
        self._begun = False
        self._ended = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        del receive  # the request has it
        state = scope["state"]
        try:
            await held_open(self._request, self._send(send))
        except ClientLeft:
            if self._ended:
                return
            if not self._begun:
                raise
            state[OUTCOME] = "client-left"
        # To return without the end of the body makes the server close the connection, which tells the client.
        except BrokenOff:
            state[OUTCOME] = "broken-off"
        except TimeoutError:
            state[OUTCOME] = "client-too-slow"

    async def _send(self, send: Send) -> None:
        async with self._opening as (task, fetched):
            headers = [(name.lower().encode(), value.encode()) for name, value in _headers(task, fetched).items()]
            self._begun = True
            await send({"type": "http.response.start", "status": _STATUSES[fetched.portion], "headers": headers})
            if HEAD in self._request.scope or fetched.portion is Portion.NOTHING:
                self._ended = True
            else:
                async for chunk in fetched.chunks:
                    async with asyncio.timeout(READER_SECONDS):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._ended = True
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _headers(task: Task, fetched: Fetched) -> dict[str, str]:
    told = {
        "Content-Range": fetched.content_range,
        "ETag": fetched.etag,
        "Last-Modified": fetched.last_modified,
        "Accept-Ranges": fetched.accept_ranges,
    }
    headers = _HEADERS | {name: value for name, value in told.items() if value}
    if fetched.portion is Portion.NOTHING:
        return headers
    if fetched.length is not None:
        headers["Content-Length"] = str(fetched.length)
    # Of words of the gateway's own alone: what the upstream calls the file is nothing to rely on.
    name = f"{task.kind}-{task.reservation[:12]}-{fetched.name}.{EXTENSIONS[fetched.media_type]}"
    return headers | {"Content-Type": fetched.media_type, "Content-Disposition": f'attachment; filename="{name}"'}


def _asked(headers: Headers, *, head: bool) -> Asked:
    """What is asked for, without what is malformed or has no meaning here, which HTTP lets a server ignore."""

    def given(name: str, pattern: re.Pattern[str]) -> str | None:
        values = headers.getall(name, [])
        return values[0].strip() if len(values) == 1 and pattern.fullmatch(values[0].strip()) else None

    wanted = None if head else given("range", _ONE_RANGE)
    return Asked(
        range=wanted,
        if_range=given("if-range", _TAG_OR_DATE) if wanted else None,
        if_none_match=given("if-none-match", _TAGS),
        if_modified_since=given("if-modified-since", _DATE),
    )
