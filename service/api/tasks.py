"""Routes that submit, read, list and stream tasks."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Annotated, Any

import msgspec
import structlog
from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, PathParameter, QueryParameter
from litestar.response.base import ASGIResponse
from litestar.types import HTTPResponseBodyEvent, HTTPResponseStartEvent, Receive, Scope, Send

from service.api import openapi
from service.api.asgi import run_until_disconnect
from service.api.auth import TenantAuth
from service.api.errors import OUTCOME, ClientDisconnected, rate_limit_headers
from service.api.params import check_query, parse_wait_seconds, preference_applied_header
from service.api.schemas import (
    PRIVATE_HEADERS,
    REPLAYED_HEADERS,
    Links,
    Task,
    TaskList,
    events_path,
    render_task,
    task_headers,
    task_path,
)
from service.api.uploads import UploadReader
from service.domain.errors import FieldError, GatewayError, InvalidOptions, Unauthenticated
from service.domain.ledger import parse_idempotency_key
from service.domain.tasks import Catalogue, Kind, State, parse_metadata, parse_options
from service.domain.tenants import Tenant
from service.domain.webhooks import resolve_webhook_url
from service.usecases.submit import Submission, Submitter
from service.usecases.task_cache import CachedTask, DurationEstimator
from service.usecases.task_status import TaskReader

EVENT_STREAM_TYPE = "text/event-stream"


MAX_STREAM_SECONDS = 600.0
"""A stream ends after so long, and its client comes again: its token is looked at anew, on whatever process it gets."""


WRITE_TIMEOUT_SECONDS = 30.0
"""A client that takes nothing for so long is cut off. No more than one event waits for it."""


_RETRY_MS = 1_000


_NO_STORE_HEADERS = {"Cache-Control": "no-store"}


# Proxies of the kind of nginx hold streams back unless they are told not to.
_STREAM_HEADERS = {"content-type": EVENT_STREAM_TYPE, "X-Accel-Buffering": "no"} | _NO_STORE_HEADERS


_HEARTBEAT = b":\n\n"


_EVENT_ID = re.compile(rf"([0-9]{{1,9}})-({'|'.join(State)})")


_STREAM_DESCRIPTION = (
    "An event `state` with the task as it is now, one for each change, and the end of the stream with the end of the "
    "task: whoever reads it to its end and finds the task in `succeeded` or `failed` is done. Comments come every 15 "
    "seconds. After 10 minutes the stream ends, and so it does when the gateway is restarted: come again with "
    "`Last-Event-ID`, as an `EventSource` does by itself, and you are told only what you do not know."
)


_LAST_EVENT_ID_DESCRIPTION = "The `id` of the last event you got. After the last one of a task the answer is 204."


_STREAM_RESPONSES = {204: ResponseSpec(None, description="You know the end of the task.", generate_examples=False)}


def event_routes(*, reader: TaskReader, tenant_auth: TenantAuth) -> Sequence[HTTPRouteHandler]:
    """The handler under `/v1/tasks/{id}/events`."""

    @get(
        "/tasks/{task_id:str}/events",
        operation_id="follow-task",
        summary="Follow a task",
        description=_STREAM_DESCRIPTION,
        media_type=EVENT_STREAM_TYPE,
        response_description="The task, again and again",
        response_headers=openapi.response_headers("Cache-Control"),
        responses=openapi.problem_responses(401, 404, "overloaded", "upstream-unavailable") | _STREAM_RESPONSES,
    )
    async def events(
        request: Request[Any, Any, Any],
        tenant: NamedDependency[Tenant],
        task_id: Annotated[str, PathParameter(description="The `id` of the task.")],
        last: Annotated[
            str | None, HeaderParameter(name="Last-Event-ID", description=_LAST_EVENT_ID_DESCRIPTION)
        ] = None,
    ) -> Response[str | None]:
        version, state = _parse_event_id(last or "")
        if state and state.is_final:
            reader.decode_id(tenant, task_id)
            return Response(None, status_code=204, headers=_NO_STORE_HEADERS)
        changes = reader.stream_changes(tenant, task_id, after_version=version, max_seconds=MAX_STREAM_SECONDS)
        return _EventStreamResponse(_EventStream(request, changes, lambda: tenant_auth.authenticate(request)))

    return [events]


def encode_event(task: Task, version: int) -> bytes:
    """A version of a task as an event. Its id tells a client that comes again with it whether that was the end."""
    return b"event: state\nid: %d-%s\ndata: %s\n\n" % (version, task.state.encode(), msgspec.json.encode(task))


def _parse_event_id(event_id: str) -> tuple[int, State | None]:
    """The version and the state that a client knows, by the id of the last event it got; -1 if it knows none."""
    found = _EVENT_ID.fullmatch(event_id)
    return (int(found[1]), State(found[2])) if found else (-1, None)


class ClientStalled(Exception):
    """The client does not take what it is sent."""


class _EventStream(ASGIResponse):
    """Sends changes for as long as `check` lets it, which raises Unauthenticated. A client that leaves ends it at once.

    Errors of the first look at the task are raised before anything is sent.
    """

    _should_set_content_length = False

    def __init__(
        self,
        request: Request[Any, Any, Any],
        changes: AsyncGenerator[CachedTask | None, None],
        authorize: Callable[[], object],
    ) -> None:
        super().__init__(headers=_STREAM_HEADERS)
        self._request = request
        self._changes = changes
        self._authorize = authorize

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request that this was made for."""
        del receive  # the request reads it
        try:
            await run_until_disconnect(self._request, self._send(send))
        except ClientDisconnected:
            scope["state"][OUTCOME] = "client-disconnected"
        except ClientStalled:  # returning without an end makes the server close the connection
            scope["state"][OUTCOME] = "client-stalled"

    async def _send(self, send: Send) -> None:
        async with aclosing(self._changes) as changes:
            first = await anext(changes)
            await _send_with_timeout(
                send, {"type": "http.response.start", "status": 200, "headers": self.encode_headers()}
            )
            # Those that an ending process leaves do not all come again in the same moment.
            retry = b"retry: %d\n" % (_RETRY_MS + secrets.randbelow(2 * _RETRY_MS))
            await _send_body(send, retry + _encode_change(first))
            async for change in changes:
                try:
                    self._authorize()
                except Unauthenticated:
                    break
                await _send_body(send, _encode_change(change))
        await _send_body(send, b"", more=False)


class _EventStreamResponse(Response[str | None]):
    """A stream as handlers give it."""

    def __init__(self, stream: _EventStream) -> None:
        super().__init__(None)
        self._stream = stream

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIResponse:
        """The stream itself."""
        return self._stream


def _encode_change(change: CachedTask | None) -> bytes:
    return encode_event(render_task(change.task), change.task.version) if change else _HEARTBEAT


async def _send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    await _send_with_timeout(send, {"type": "http.response.body", "body": body, "more_body": more})


async def _send_with_timeout(send: Send, message: HTTPResponseStartEvent | HTTPResponseBodyEvent) -> None:
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_SECONDS):
            await send(message)
    except TimeoutError:
        raise ClientStalled from None


_log = structlog.get_logger(__name__)


IMAGE_PART = "image"


_METADATA_FIELD, _WEBHOOK_FIELD = "metadata", "webhook_url"


_NON_OPTION_FIELDS = frozenset({_METADATA_FIELD, _WEBHOOK_FIELD})


_MAX_PAGE_SIZE = 100


_SUBMIT_DESCRIPTION = (
    "The image is sent on once, and the answer comes as soon as the upstream has accepted it; then follow the task "
    "until it has ended. Part order does not matter. A field that the kind does not know is refused, never ignored. "
    "Only an answer of 201 or 504 may have been charged: send it again with the same `Idempotency-Key`, and it is "
    "charged once."
)


_IDEMPOTENCY_KEY_DESCRIPTION = (
    'A key of your making, best a UUID in quotes: `"8e03978e-40d5-43dd-bc93-6894a57f9324"`. Within 24 hours the same '
    "submission under the same key is sent on once, and answered with what became of the first."
)


_READ_DESCRIPTION = (
    "Reading costs nothing: the gateway follows each task by itself. Ask again after `Retry-After` until it is gone, "
    "with `If-None-Match` to be sent the task only if it has changed."
)


_PREFER_DESCRIPTION = (
    "`wait=N` waits for the end of the task, for N seconds from 1 to 60 at the most; bare `wait` is 60."
)


_SUBMIT_PROBLEMS = (
    *(400, 401, 402, "kind-not-allowed", "tenant-disabled", "idempotency-in-flight", 413, 415),
    *("invalid-options", "invalid-image", "idempotency-key-reused", 429, "upstream-rejected", 503, 504),
)


def task_routes(
    *,
    submitter: Submitter,
    reader: TaskReader,
    uploads: UploadReader,
    catalogue: Catalogue,
    estimator: DurationEstimator,
) -> Sequence[HTTPRouteHandler]:
    """The handlers under `/v1/tasks`."""

    async def waited_for(
        request: Request[Any, Any, Any], tenant: Tenant, task_id: str, wait: int
    ) -> tuple[CachedTask, dict[str, str]]:
        """A task, and its headers, after a wait for its end if that is preferred. Raises ClientLeft."""
        reading = reader.read(tenant, task_id, wait_seconds=wait)
        seen = await (run_until_disconnect(request, reading) if wait else reading)
        return seen, task_headers(seen, estimator) | preference_applied_header(wait)

    async def received(request: Request[Any, Any, Any], tenant: Tenant, kind: Kind, key: str | None) -> Submission:
        """What became of the image that is uploaded; nothing of it is kept while its task is waited for."""
        async with uploads.receive(request.scope, request.receive, part=IMAGE_PART) as upload:
            beside, fields = _split_fields(upload.fields)
            options = parse_options(kind, fields, catalogue)
            metadata = parse_metadata(beside.get(_METADATA_FIELD))
            webhook = resolve_webhook_url(tenant.webhook, beside.get(_WEBHOOK_FIELD))
            return await submitter.submit(
                tenant, options, metadata, upload.image, idempotency_key=key, webhook_url=webhook
            )

    def submitting(kind: Kind) -> HTTPRouteHandler:
        @post(
            f"/tasks/{kind}",
            name=f"submit-{kind}",
            operation_id=f"submit-{kind}",
            summary=openapi.SUBMIT_SUMMARIES[kind],
            description=_SUBMIT_DESCRIPTION,
            operation_class=openapi.submit_operation(kind, catalogue),
            response_description="The task, now that the upstream has accepted the image",
            response_headers=openapi.response_headers(
                "Location",
                "ETag",
                "Retry-After",
                "RateLimit-Policy",
                "RateLimit",
                "Idempotent-Replayed",
                "Preference-Applied",
                "Cache-Control",
            ),
            responses=openapi.problem_responses(*_SUBMIT_PROBLEMS),
            status_code=201,
        )
        async def handler(
            request: Request[Any, Any, Any],
            tenant: NamedDependency[Tenant],
            idempotency_key: Annotated[
                str | None, HeaderParameter(name="Idempotency-Key", description=_IDEMPOTENCY_KEY_DESCRIPTION)
            ] = None,
            prefer: Annotated[str | None, HeaderParameter(name="Prefer", description=_PREFER_DESCRIPTION)] = None,
        ) -> Response[Task]:
            del idempotency_key, prefer  # declared for the API's document; there may be several of each
            submitter.check_allowed(tenant, kind)
            key = parse_idempotency_key(request.headers.getall("idempotency-key", []))
            if request.query_params:
                raise InvalidOptions([FieldError(name, "goes into the form") for name in request.query_params])
            accepted = await received(request, tenant, kind, key)
            return await _accepted_response(
                request, accepted, estimator, partial(waited_for, request, tenant, accepted.task.id)
            )

        return handler

    @get(
        "/tasks/{task_id:str}",
        operation_id="read-task",
        summary="Read a task",
        description=_READ_DESCRIPTION,
        response_description="The task as it is known now",
        response_headers=openapi.response_headers("ETag", "Age", "Retry-After", "Preference-Applied", "Cache-Control"),
        responses=openapi.problem_responses(401, 404, "overloaded", "upstream-unavailable") | openapi.NOT_MODIFIED,
    )
    async def read(
        request: Request[Any, Any, Any],
        tenant: NamedDependency[Tenant],
        task_id: Annotated[str, PathParameter(description="The `id` of the task.")],
        known: Annotated[
            str | None, HeaderParameter(name="If-None-Match", description="The `ETag` of the version you know.")
        ] = None,
        prefer: Annotated[str | None, HeaderParameter(name="Prefer", description=_PREFER_DESCRIPTION)] = None,
    ) -> Response[Task | None]:
        del prefer  # declared for the API's document; there may be several
        seen, headers = await waited_for(
            request, tenant, task_id, parse_wait_seconds(request.headers.getall("prefer", []))
        )
        if _matches_etag(known or "", headers["ETag"]):
            return Response(None, status_code=304, headers=headers)
        return Response(render_task(seen.task), headers=headers)

    @get(
        "/tasks",
        operation_id="list-tasks",
        summary="List your tasks, newest first",
        description="Go on with `next_cursor` until it is null. A page may hold fewer tasks than you asked for.",
        response_description="A page of tasks",
        response_headers=openapi.response_headers("Cache-Control"),
        responses=openapi.problem_responses(400, 401, "invalid-options", "ledger-unavailable"),
    )
    async def page(
        request: Request[Any, Any, Any],
        tenant: NamedDependency[Tenant],
        task_state: Annotated[
            State | None, QueryParameter(name="state", description="Only tasks in this state.")
        ] = None,
        kind: Annotated[Kind | None, QueryParameter(description="Only tasks of this kind.")] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=_MAX_PAGE_SIZE, description="How many tasks at the most.")] = 20,
        cursor: Annotated[str | None, QueryParameter(description="`next_cursor` of the page before.")] = None,
    ) -> Response[TaskList]:
        check_query(request, request.route_handler)
        found = await reader.list_tasks(tenant, state=task_state, kind=kind, limit=limit, cursor=cursor)
        return Response(
            TaskList([render_task(task) for task in found.tasks], found.next_cursor), headers=PRIVATE_HEADERS
        )

    return [*(submitting(kind) for kind in Kind), read, page]


async def _accepted_response(
    request: Request[Any, Any, Any],
    accepted: Submission,
    estimator: DurationEstimator,
    read_with_wait: Callable[[int], Awaitable[tuple[CachedTask, dict[str, str]]]],
) -> Response[Any]:
    """The task of a submission that was accepted, whatever goes wrong from here: else its caller would pay again."""
    try:
        seen = CachedTask(accepted.task, accepted.known_at, time.monotonic())
        headers = task_headers(seen, estimator)
        if wait := parse_wait_seconds(request.headers.getall("prefer", [])):
            with suppress(GatewayError):  # the image was accepted, whatever becomes of looking after it
                seen, headers = await read_with_wait(wait)
        del headers["Age"]
        headers |= {"Location": task_path(seen.task)} | rate_limit_headers(accepted.rate_limits)
        headers |= REPLAYED_HEADERS if accepted.is_replay else {}
        return Response(render_task(seen.task), headers=headers)
    except ClientDisconnected:
        raise
    except Exception:  # noqa: BLE001 - whatever it is
        _log.exception("submission.response_error", reservation=accepted.task.reservation)
        headers = PRIVATE_HEADERS | {"Location": task_path(accepted.task)}
        try:
            return Response(render_task(accepted.task), headers=headers)
        except Exception:  # noqa: BLE001 - where the task itself can't be shown, its id can
            links = Links(self=task_path(accepted.task), events=events_path(accepted.task))
            return Response({"id": accepted.task.id, "links": links}, headers=headers)


def _split_fields(fields: Sequence[tuple[str, str]]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Take what is no option of the kind out of the form; what is empty is not given.

    Raises InvalidOptions for what is given more than once.
    """
    taken: dict[str, str] = {}
    errors = []
    for name, value in fields:
        if name not in _NON_OPTION_FIELDS or not value:
            continue
        if name in taken:
            errors.append(FieldError(name, "is given more than once"))
        taken[name] = value
    if errors:
        raise InvalidOptions(errors)
    return taken, [field for field in fields if field[0] not in _NON_OPTION_FIELDS]


def _matches_etag(condition: str, tag: str) -> bool:
    """Whether an If-None-Match names this entity tag (RFC 9110, weak comparison)."""
    tags = [part.strip().removeprefix("W/") for part in condition.split(",")]
    return tag in tags or "*" in tags
