"""The read of one task, the most frequent request, beside litestar's handler of the same route."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from litestar.types import ASGIApp, Receive, Scope, Send

from service.api import schemas
from service.api.asgi import IS_PATH_SAFE
from service.api.auth import TenantAuth
from service.domain.errors import GatewayError
from service.usecases.caches import CachedTask, DurationEstimator
from service.usecases.task_status import TaskReader

_READ_HEADERS = (b"authorization", b"if-none-match", b"prefer")
_PRIVATE_FIELDS = tuple((name.lower().encode(), value.encode()) for name, value in schemas.PRIVATE_HEADERS.items())


class _Content(msgspec.Struct, frozen=True):
    """A task as it is sent, without what depends on the time."""

    etag: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    body_headers: tuple[tuple[bytes, bytes], ...]


def read_middleware(
    tenant_auth: TenantAuth, reader: TaskReader, estimator: DurationEstimator
) -> Callable[[ASGIApp], ASGIApp]:
    # A function, since litestar makes deep copies of what else it is given.
    return lambda app: _ReadMiddleware(app, tenant_auth, reader, estimator)


class _ReadMiddleware:
    """Serves reads without litestar's request, parameters, dependencies and response, which cost four times as much.

    The handler behind it serves those that wait (`Prefer`), have a field twice, or are not authenticated. Errors are
    raised, as in a handler.
    """

    def __init__(self, app: ASGIApp, tenant_auth: TenantAuth, reader: TaskReader, estimator: DurationEstimator) -> None:
        self._app = app
        self._tenant_auth = tenant_auth
        self._reader = reader
        self._estimator = estimator
        self._encode = msgspec.json.Encoder().encode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fields = [field for field in scope["headers"] if field[0] in _READ_HEADERS]
        values = dict(fields)
        if b"prefer" in values or len(values) < len(fields):
            await self._app(scope, receive, send)
            return
        try:
            tenant, token = self._tenant_auth.authenticate_header(scope, values.get(b"authorization", b""))
        except GatewayError:  # raised again behind a delay
            await self._app(scope, receive, send)
            return
        self._tenant_auth.count_read(token)
        task_id = scope["path_params"]["task_id"]
        cached = self._reader.read_cached(tenant, task_id) or await self._reader.read(tenant, task_id)
        scope["state"][IS_PATH_SAFE] = True
        await self._respond(cached, values.get(b"if-none-match"), send)

    async def _respond(self, cached: CachedTask, if_none_match: bytes | None, send: Send) -> None:
        content = cached.content or self._fill_content(cached)
        headers = [*content.headers, (b"age", b"%d" % max(int(cached.age_seconds), 0))]
        if not cached.task.state.is_final:
            seconds = self._estimator.retry_after(cached.task, cached.known_at)
            headers.append((b"retry-after", b"%d" % seconds))
        if if_none_match and matches_etag(if_none_match, content.etag):
            start: Any = {"type": "http.response.start", "status": 304, "headers": headers}
            body = b""
        else:
            headers += content.body_headers
            start, body = {"type": "http.response.start", "status": 200, "headers": headers}, content.body
        await send(start)
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _fill_content(self, cached: CachedTask) -> _Content:
        body, etag = self._encode(schemas.render_task(cached.task)), schemas.task_etag(cached.task).encode()
        content = cached.content = _Content(
            etag=etag,
            headers=(*_PRIVATE_FIELDS, (b"etag", etag)),
            body=body,
            body_headers=((b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))),
        )
        return content


def matches_etag(if_none_match: bytes, etag: bytes) -> bool:
    """Whether a header names an ETag or all of them, by weak comparison (RFC 9110)."""
    etags = [item.strip().removeprefix(b"W/") for item in if_none_match.split(b",")]
    return etag in etags or b"*" in etags
