"""Handing out results: their bytes go through this process as they come, a few at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, cast

from litestar import Request, Response, get
from litestar.datastructures import Headers
from litestar.di import NamedDependency
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, PathParameter
from litestar.response.base import ASGIResponse

from service.api import openapi
from service.api.asgi import HEAD_KEY, Send, disconnect_outcome
from service.api.auth import TenantAuth
from service.api.errors import OUTCOME, ClientDisconnected, to_problem
from service.api.schemas import PRIVATE_HEADERS
from service.domain.errors import TenantDisabled, Unauthenticated
from service.domain.media import EXTENSIONS
from service.domain.tasks import ArtifactName, Task
from service.domain.tenants import Tenant
from service.usecases.ports import ArtifactStream, Coverage, RangeRequest, TransferAborted
from service.usecases.task_status import TaskReader

_DESCRIPTION = (
    "The bytes come through the gateway, so that you need not be able to reach the upstream's store. Fetch them soon "
    "and keep them: the upstream may remove them. If the connection closes before the end, the result is incomplete: "
    "request the rest with `Range` and `If-Range`."
)
_RANGE_DESCRIPTION = "One range of bytes, such as `bytes=1000-`. With several ranges the whole result is sent."
_STATUSES: Mapping[Coverage, int] = {Coverage.FULL: 200, Coverage.PARTIAL: 206, Coverage.NOT_MODIFIED: 304}
_HEADERS = PRIVATE_HEADERS | {"Content-Security-Policy": "default-src 'none'; sandbox"}

_ONE_RANGE = re.compile(r"bytes=(?:[0-9]{1,18}-[0-9]{0,18}|-[0-9]{1,18})")
_ETAG = r'(?:W/)?"[!#-~]{0,200}"'
_ETAGS = re.compile(rf"\*|{_ETAG}(?:[ \t]*,[ \t]*{_ETAG})*")
_DATE = re.compile(r"[A-Za-z0-9 ,:+-]{1,64}")
_ETAG_OR_DATE = re.compile(rf"{_ETAG}|{_DATE.pattern}")

ArtifactContext = AbstractAsyncContextManager[tuple[Task, ArtifactStream]]


def artifact_routes(reader: TaskReader, tenant_auth: TenantAuth) -> list[HTTPRouteHandler]:
    @get(
        "/tasks/{task_id:str}/artifacts/{name:str}",
        summary="Fetch a result",
        description=_DESCRIPTION,
        response_description="The whole result",
        response_headers=openapi.response_headers("Content-Disposition", "ETag", "Last-Modified", "Accept-Ranges"),
        responses=openapi.problem_responses(
            401,
            "tenant-disabled",
            404,
            416,
            "rate-limited",
            "upstream-invalid-response",
            "upstream-unavailable",
            "overloaded",
        )
        | openapi.NOT_MODIFIED
        | {206: ResponseSpec(bytes, description="The requested range", generate_examples=False)},
    )
    async def read_artifact(
        request: Request[Any, Any, Any],
        tenant: NamedDependency[Tenant],
        task_id: Annotated[str, PathParameter(description="The `id` of the task.")],
        name: Annotated[
            str, PathParameter(description="Which of its `artifacts`.", schema_extra={"enum": list(ArtifactName)})
        ],
        range_: Annotated[str | None, HeaderParameter(name="Range", description=_RANGE_DESCRIPTION)] = None,
        if_range: Annotated[
            str | None, HeaderParameter(name="If-Range", description="The `ETag` of the part you have.")
        ] = None,
        if_none_match: Annotated[
            str | None, HeaderParameter(name="If-None-Match", description="The `ETag` of the result you have.")
        ] = None,
        if_modified_since: Annotated[
            str | None,
            HeaderParameter(name="If-Modified-Since", description="The `Last-Modified` of the result you have."),
        ] = None,
    ) -> Response[bytes]:
        del range_, if_range, if_none_match, if_modified_since  # declared for the OpenAPI document
        range_request = _parse_range_request(request.headers, is_head=HEAD_KEY in request.scope)
        artifact = reader.open_artifact(tenant, task_id, name, range_request)
        return ArtifactResponse(request, artifact, tenant_auth)

    return [read_artifact]


class ArtifactResponse(Response[bytes]):
    """Streams a result. Errors before its first byte are raised, and become problems.

    The artifact is opened when it is sent, so that one block holds all that it keeps open.
    """

    def __init__(self, request: Request[Any, Any, Any], artifact: ArtifactContext, tenant_auth: TenantAuth) -> None:
        super().__init__(b"")
        self._request = request
        self._tenant_auth = tenant_auth
        self._artifact = artifact
        self._is_started = False
        self._is_complete = False

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIResponse:
        return cast("ASGIResponse", self)  # Litestar only calls it as an ASGI application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        del receive  # the request reads it
        state = scope["state"]
        try:
            await self._tenant_auth.run_while_authorized(self._request, self._send(send))
        except ClientDisconnected:
            if self._is_complete:
                return
            if not self._is_started:
                raise
            state[OUTCOME] = disconnect_outcome(scope)
        except (Unauthenticated, TenantDisabled) as error:
            if not self._is_started:
                raise
            state[OUTCOME] = to_problem(error).type.code
        # Returning before the end of the body makes the server close the connection, which the client notices.
        except TransferAborted:
            state[OUTCOME] = "transfer-aborted"

    async def _send(self, send: Send) -> None:
        async with self._artifact as (task, stream):
            fields = _response_headers(task, stream)
            headers = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
            self._is_started = True
            await send({"type": "http.response.start", "status": _STATUSES[stream.coverage], "headers": headers})
            if HEAD_KEY in self._request.scope or stream.coverage is Coverage.NOT_MODIFIED:
                self._is_complete = True
            else:
                async for chunk in stream.chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._is_complete = True
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _response_headers(task: Task, stream: ArtifactStream) -> dict[str, str]:
    optional = {
        "Content-Range": stream.content_range,
        "ETag": stream.etag,
        "Last-Modified": stream.last_modified,
        "Accept-Ranges": stream.accept_ranges,
    }
    headers = _HEADERS | {name: value for name, value in optional.items() if value}
    if stream.coverage is Coverage.NOT_MODIFIED:
        return headers
    if stream.length is not None:
        headers["Content-Length"] = str(stream.length)
    # Made of the gateway's own words only: the upstream's name of the file can't be relied on.
    name = f"{task.kind}-{task.reservation[:12]}-{stream.name}.{EXTENSIONS[stream.media_type]}"
    return headers | {"Content-Type": stream.media_type, "Content-Disposition": f'attachment; filename="{name}"'}


def _parse_range_request(headers: Headers, *, is_head: bool) -> RangeRequest:
    """Read the conditional and range headers; malformed ones are ignored, as HTTP allows."""

    def read(name: str, pattern: re.Pattern[str]) -> str | None:
        values = headers.getall(name, [])
        return values[0].strip() if len(values) == 1 and pattern.fullmatch(values[0].strip()) else None

    range_ = None if is_head else read("range", _ONE_RANGE)
    return RangeRequest(
        range=range_,
        if_range=read("if-range", _ETAG_OR_DATE) if range_ else None,
        if_none_match=read("if-none-match", _ETAGS),
        if_modified_since=read("if-modified-since", _DATE),
    )
