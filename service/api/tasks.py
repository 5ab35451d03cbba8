"""Routes that submit, read, list and stream tasks.

Streams are server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html).
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Annotated, Any, cast

import msgspec
import structlog
from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, PathParameter, QueryParameter
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send

from service.api import openapi, schemas
from service.api.asgi import disconnect_outcome
from service.api.auth import TenantAuth
from service.api.compression import CompressionMiddleware
from service.api.errors import OUTCOME, ClientDisconnected, rate_limit_headers, to_problem
from service.api.overload import overload_middleware
from service.api.params import check_query, parse_wait_seconds
from service.api.reads import matches_etag, read_middleware
from service.api.submissions import SubmissionReceiver
from service.domain.errors import FieldError, GatewayError, InvalidOptions, TenantDisabled, Unauthenticated
from service.domain.ledger import IDEMPOTENCY_KEY_PATTERN, MAX_IDEMPOTENCY_HEADER_CHARS, parse_idempotency_key
from service.domain.tasks import Catalogue, Kind, State
from service.domain.tenants import Tenant
from service.usecases.caches import CachedTask, DurationEstimator
from service.usecases.reports import SubmissionReports
from service.usecases.submit import Submission
from service.usecases.task_status import TaskReader

_log = structlog.get_logger(__name__)

EVENT_STREAM_TYPE = "text/event-stream"
MAX_STREAM_SECONDS = 600.0
"""A stream ends after this time. Its client reconnects, to any process, which checks its token again."""

_MAX_PAGE_SIZE = 100

_RETRY_MS = 1_000
_NO_STORE_HEADERS = {"Cache-Control": "no-store"}
# nginx and similar proxies buffer streams unless X-Accel-Buffering forbids it.
_STREAM_HEADERS = {"content-type": EVENT_STREAM_TYPE, "X-Accel-Buffering": "no"} | _NO_STORE_HEADERS
_HEARTBEAT = b":\n\n"
_EVENT_ID = re.compile(rf"([0-9]{{1,9}})-({'|'.join(State)})")

_SUBMIT_DESCRIPTION = (
    "The form has the image or its `image_url`. With `image_url` it may also be urlencoded or a JSON object, such as "
    '`{"image_url": "https://images.example/photo.jpg", "metadata": {"order": "4711"}}`. The image is sent to the '
    "upstream once; the response comes as soon as the upstream has accepted it. Then follow the task to its end. Part "
    "order does not matter. An unknown field is an error, never ignored. Only a response of 201 or 504 may have been "
    "charged: repeat the request with the same `Idempotency-Key`, and it is charged once."
)
_IDEMPOTENCY_KEY_DESCRIPTION = (
    'A key of your choice, best a UUID in quotes: `"8e03978e-40d5-43dd-bc93-6894a57f9324"`. Within 24 hours the same '
    "submission under the same key is sent once; repetitions are answered with the outcome of the first."
)
_READ_DESCRIPTION = (
    "Reading is free: the gateway follows each task by itself. Repeat after `Retry-After` seconds until that header is "
    "absent, with `If-None-Match` to receive the task only if it has changed."
)
_PREFER_DESCRIPTION = "`wait=N` waits up to N seconds, from 1 to 60, for the end of the task; bare `wait` is 60."
_STREAM_DESCRIPTION = (
    "An event `state` with the current task, one for each change. The stream ends with the task, in `succeeded` or "
    "`failed`, and comments come every 15 seconds. It also ends after 10 minutes and when the gateway restarts: "
    "reconnect with `Last-Event-ID`, as an `EventSource` does by itself, and only newer changes are sent."
)
_LAST_EVENT_ID_DESCRIPTION = "The `id` of the last event received. After the last one of a task the response is 204."

_SUBMIT_HEADERS = (
    *("Location", "ETag", "Retry-After", "RateLimit-Policy", "RateLimit"),
    *("Idempotent-Replayed", "Preference-Applied"),
)
_SUBMIT_PROBLEMS = (
    *(400, 401, 402, "kind-not-allowed", "tenant-read-only", "tenant-disabled", "idempotency-in-flight", 413, 415),
    *("invalid-options", "invalid-image", "image-unreachable", "idempotency-key-reused", 429, "upstream-rejected", 503),
    504,
)
_STREAM_RESPONSES = {204: ResponseSpec(None, description="The task has ended", generate_examples=False)}
_LIST_DESCRIPTION = "Continue with `next_cursor` until it is null. A page may hold fewer tasks than `limit`."
StateFilter = Annotated[State | None, QueryParameter(name="state", description="Only tasks in this state.")]
KindFilter = Annotated[Kind | None, QueryParameter(description="Only tasks of this kind.")]
PageSize = Annotated[int, QueryParameter(ge=1, le=_MAX_PAGE_SIZE, description="The most tasks to return.")]
Cursor = Annotated[str | None, QueryParameter(description="`next_cursor` of the previous page.")]


def task_routes(
    *,
    tenant_auth: TenantAuth,
    receiver: SubmissionReceiver,
    reader: TaskReader,
    catalogue: Catalogue,
    estimator: DurationEstimator,
) -> Sequence[HTTPRouteHandler]:
    async def read_with_wait(
        request: Request[Any, Any, Any], tenant: Tenant, task_id: str, wait: int
    ) -> tuple[CachedTask, dict[str, str]]:
        reading = reader.read(tenant, task_id, wait_seconds=wait)
        cached = await (tenant_auth.run_while_authorized(request, reading) if wait else reading)
        headers = schemas.task_headers(cached, estimator)
        if wait:
            headers["Preference-Applied"] = f"wait={wait}"
        return cached, headers

    def make_submit_handler(kind: Kind) -> HTTPRouteHandler:
        @post(
            f"/tasks/{kind}",
            name=f"submit-{kind}",
            summary=openapi.SUBMIT_SUMMARIES[kind],
            description=_SUBMIT_DESCRIPTION,
            operation_class=openapi.submit_operation(kind, catalogue),
            response_description="The accepted task",
            response_headers=openapi.response_headers(*_SUBMIT_HEADERS),
            responses=openapi.problem_responses(*_SUBMIT_PROBLEMS),
            status_code=201,
            middleware=[overload_middleware(tenant_auth, receiver.uploads.memory)],
        )
        async def handler(
            request: Request[Any, Any, Any],
            tenant: NamedDependency[Tenant],
            idempotency_key: Annotated[
                str | None,
                HeaderParameter(
                    name="Idempotency-Key",
                    schema_extra={"pattern": IDEMPOTENCY_KEY_PATTERN, "max_length": MAX_IDEMPOTENCY_HEADER_CHARS},
                    description=_IDEMPOTENCY_KEY_DESCRIPTION,
                ),
            ] = None,
            prefer: Annotated[str | None, HeaderParameter(name="Prefer", description=_PREFER_DESCRIPTION)] = None,
        ) -> Response[schemas.Task]:
            del idempotency_key, prefer  # declared for the OpenAPI document; each may be sent several times
            receiver.submitter.check_allowed(tenant, kind)
            key = parse_idempotency_key(request.headers.getall("idempotency-key", []))
            if request.query_params:
                raise InvalidOptions([FieldError(name, "goes into the form") for name in request.query_params])
            accepted = await receiver.receive(request, tenant, kind, key)
            return await _accepted_response(
                request, accepted, estimator, partial(read_with_wait, request, tenant, accepted.task.id)
            )

        return handler

    @get(
        "/tasks/{task_id:str}",
        summary="Read a task",
        description=_READ_DESCRIPTION,
        response_description="The current task",
        response_headers=openapi.response_headers("ETag", "Age", "Retry-After", "Preference-Applied"),
        responses=openapi.problem_responses(
            401, "tenant-disabled", 404, "rate-limited", "overloaded", "upstream-unavailable"
        )
        | openapi.NOT_MODIFIED,
        middleware=[read_middleware(tenant_auth, reader, estimator)],
    )
    async def read_task(
        request: Request[Any, Any, Any],
        tenant: NamedDependency[Tenant],
        task_id: Annotated[str, PathParameter(description="The `id` of the task.")],
        if_none_match: Annotated[
            str | None, HeaderParameter(name="If-None-Match", description="The `ETag` of the version you have.")
        ] = None,
        prefer: Annotated[str | None, HeaderParameter(name="Prefer", description=_PREFER_DESCRIPTION)] = None,
    ) -> Response[schemas.Task | None]:
        del prefer  # declared for the OpenAPI document; it may be sent several times
        wait = parse_wait_seconds(request.headers.getall("prefer", []))
        cached, headers = await read_with_wait(request, tenant, task_id, wait)
        if if_none_match and matches_etag(if_none_match.encode(), headers["ETag"].encode()):
            return Response(None, status_code=304, headers=headers)
        return Response(schemas.render_task(cached.task), headers=headers)

    @get(
        "/tasks",
        summary="List your tasks, newest first",
        description=_LIST_DESCRIPTION,
        response_description="A page of tasks",
        responses=openapi.problem_responses(
            400, 401, "tenant-disabled", "invalid-options", "rate-limited", "ledger-unavailable"
        ),
        middleware=[CompressionMiddleware],
    )
    async def list_tasks(
        request: Request[Any, Any, Any],
        tenant: NamedDependency[Tenant],
        task_state: StateFilter = None,
        kind: KindFilter = None,
        limit: PageSize = 20,
        cursor: Cursor = None,
    ) -> schemas.TaskList:
        check_query(request, request.route_handler)
        page = await reader.tasks.list_page(tenant.id, state=task_state, kind=kind, limit=limit, cursor=cursor)
        return schemas.TaskList([schemas.render_task(task) for task in page.tasks], page.next_cursor)

    return [*(make_submit_handler(kind) for kind in Kind), read_task, list_tasks]


def operator_task_routes(submissions: SubmissionReports) -> Sequence[HTTPRouteHandler]:
    @get(
        "/tasks/{task_id:str}",
        summary="Read any task and its tenant",
        description="The task as it is stored: reading it does not check it at the upstream.",
        response_description="The task",
        responses=openapi.operator_problems(404, "ledger-unavailable"),
    )
    async def read_any_task(
        task_id: Annotated[str, PathParameter(description="The `id` of the task, or of its submission.")],
    ) -> schemas.OperatorTask:
        return schemas.render_operator_task(await submissions.read_task(task_id))

    @get(
        "/tasks",
        summary="List a tenant's tasks, newest first",
        description=_LIST_DESCRIPTION,
        response_description="A page of tasks",
        responses=openapi.operator_problems(404, "malformed-request", "ledger-unavailable"),
    )
    async def list_tenant_tasks(
        tenant: Annotated[
            str, QueryParameter(description="Its name. Of a deleted one, the last of this name is listed.")
        ],
        task_state: StateFilter = None,
        kind: KindFilter = None,
        limit: PageSize = 20,
        cursor: Cursor = None,
    ) -> schemas.OperatorTaskList:
        reports, next_cursor = await submissions.list_tasks(
            tenant, state=task_state, kind=kind, limit=limit, cursor=cursor
        )
        return schemas.OperatorTaskList([schemas.render_operator_task(report) for report in reports], next_cursor)

    return [read_any_task, list_tenant_tasks]


def event_routes(*, reader: TaskReader, tenant_auth: TenantAuth) -> Sequence[HTTPRouteHandler]:
    @get(
        "/tasks/{task_id:str}/events",
        summary="Follow a task",
        description=_STREAM_DESCRIPTION,
        media_type=EVENT_STREAM_TYPE,
        response_description="The changes of the task",
        responses=openapi.problem_responses(
            401, "tenant-disabled", 404, "rate-limited", "overloaded", "upstream-unavailable"
        )
        | _STREAM_RESPONSES,
    )
    async def follow_task(
        request: Request[Any, Any, Any],
        tenant: NamedDependency[Tenant],
        task_id: Annotated[str, PathParameter(description="The `id` of the task.")],
        last_event_id: Annotated[
            str | None, HeaderParameter(name="Last-Event-ID", description=_LAST_EVENT_ID_DESCRIPTION)
        ] = None,
    ) -> Response[str | None]:
        version, state = _parse_event_id(last_event_id or "")
        if state and state.is_final:
            reader.decode_id(tenant, task_id)
            return Response(None, status_code=204, headers=_NO_STORE_HEADERS)
        changes = reader.stream_changes(tenant, task_id, after_version=version, max_seconds=MAX_STREAM_SECONDS)
        return EventStreamResponse(request, changes, tenant_auth)

    return [follow_task]


def encode_event(task: schemas.Task, version: int) -> bytes:
    # The id contains the state, so that a client which reconnects with it shows whether that was the last event.
    return b"event: state\nid: %d-%s\ndata: %s\n\n" % (version, task.state.encode(), msgspec.json.encode(task))


class EventStreamResponse(Response[str | None]):
    """Streams changes until the client disconnects or loses its access.

    Errors of the first read of the task are raised before anything is sent.
    """

    def __init__(
        self,
        request: Request[Any, Any, Any],
        changes: AsyncGenerator[CachedTask | None, None],
        tenant_auth: TenantAuth,
    ) -> None:
        super().__init__(None)
        self._request = request
        self._changes = changes
        self._tenant_auth = tenant_auth
        self._is_started = False

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIResponse:
        return cast("ASGIResponse", self)  # Litestar only calls it as an ASGI application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive  # the request reads it
        try:
            try:
                await self._tenant_auth.run_while_authorized(self._request, self._send_changes(send))
            except (Unauthenticated, TenantDisabled) as error:
                if not self._is_started:
                    raise
                scope["state"][OUTCOME] = to_problem(error).type.code
            await _send_body(send, b"", more=False)
        except ClientDisconnected:
            scope["state"][OUTCOME] = disconnect_outcome(scope)

    async def _send_changes(self, send: Send) -> None:
        async with aclosing(self._changes) as changes:
            first = await anext(changes)
            headers = [(name.lower().encode(), value.encode()) for name, value in _STREAM_HEADERS.items()]
            self._is_started = True
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            # Spread, so that the clients of a process that ends do not all reconnect at the same moment.
            retry = b"retry: %d\n" % (_RETRY_MS + secrets.randbelow(2 * _RETRY_MS))
            await _send_body(send, retry + _encode_change(first))
            async for change in changes:
                await _send_body(send, _encode_change(change))


def _parse_event_id(event_id: str) -> tuple[int, State | None]:
    """Return the version and the state of the last event received; -1 and None for an unknown id."""
    match = _EVENT_ID.fullmatch(event_id)
    return (int(match[1]), State(match[2])) if match else (-1, None)


def _encode_change(change: CachedTask | None) -> bytes:
    return encode_event(schemas.render_task(change.task), change.task.version) if change else _HEARTBEAT


async def _send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _accepted_response(
    request: Request[Any, Any, Any],
    accepted: Submission,
    estimator: DurationEstimator,
    read_with_wait: Callable[[int], Awaitable[tuple[CachedTask, dict[str, str]]]],
) -> Response[Any]:
    """Return the accepted task whatever fails from here on: any other response would make the caller pay again."""
    try:
        cached = CachedTask(accepted.task, accepted.known_at, time.monotonic())
        headers = schemas.task_headers(cached, estimator)
        if wait := parse_wait_seconds(request.headers.getall("prefer", [])):
            with suppress(GatewayError):
                cached, headers = await read_with_wait(wait)
        del headers["Age"]
        headers |= {"Location": schemas.task_path(cached.task)} | rate_limit_headers(accepted.rate_limits)
        headers |= schemas.REPLAYED_HEADERS if accepted.is_replay else {}
        return Response(schemas.render_task(cached.task), headers=headers)
    except ClientDisconnected:
        raise
    except Exception:  # noqa: BLE001 - the task was accepted
        _log.exception("submission.response_error", reservation=accepted.task.reservation)
        headers = {"Location": schemas.task_path(accepted.task)}
        try:
            return Response(schemas.render_task(accepted.task), headers=headers)
        except Exception:  # noqa: BLE001 - its id alone is still of use
            links = schemas.Links(self=schemas.task_path(accepted.task), events=schemas.events_path(accepted.task))
            return Response({"id": accepted.task.id, "links": links}, headers=headers)
