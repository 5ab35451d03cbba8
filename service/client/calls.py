"""The calls of the API as generators: they yield requests and pauses, and are sent the outcomes.

`GatewayClient` and `AsyncGatewayClient` run them, so that both have the same retries.

Every call can be repeated: reads change nothing, and a submission has an `Idempotency-Key`, under which the gateway
sends an image to the upstream once. After a failure that may pass, a call is repeated after the greater of
`Retry-After` and a growing pause, as long as the pauses end within `retry_seconds`.
"""

from __future__ import annotations

import math
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias, TypeVar
from urllib.parse import quote

import httpx2
import msgspec

from service.client import errors
from service.client.errors import GatewayError
from service.client.models import Quota, Submission, SubmittedTask, Task, TaskPage, Usage

T = TypeVar("T")
ImageSource: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO
"""The path of a file, the content, or a file opened for reading bytes."""

DEFAULT_PAUSE_SECONDS, MIN_PAUSE_SECONDS = 1.0, 0.1
"""Between two reads of a task, if the gateway neither waits nor says when to repeat."""
WAIT_SECONDS = 30
"""For which one request waits; the gateway allows 60, some proxies close connections after that."""
_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.5, 8.0
_MAX_CONNECT_ATTEMPTS = 5
"""A wrong address is reported after 4 seconds, and a gateway may restart meanwhile."""
_MAX_PAGE_SIZE = 100
_PROXY_STATUSES = frozenset({408, 429, 502, 503, 504})
"""Of proxies in front of the gateway, without a problem document."""
_TRANSIENT_CODES = frozenset(
    {
        *("idempotency-in-flight", "too-many-active-tasks", "internal-error"),
        *("ledger-unavailable", "upstream-unavailable", "overloaded"),
    }
)
_KEY = re.compile(r"[ -~]{1,255}")


class Receiver(Protocol):
    """Receives the body of a successful response, instead of memory."""

    def begin(self, response: httpx2.Response) -> None: ...

    def write(self, chunk: bytes) -> None: ...


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    form: Mapping[str, str] | None = None
    json: Mapping[str, Any] | None = None
    image: tuple[str, bytes] | None = None
    """Its file name and content."""
    extra_seconds: float = 0.0
    """How much later than usual the response may come."""
    receiver: Receiver | None = None


Outcome: TypeAlias = httpx2.Response | httpx2.RequestError
Call: TypeAlias = Generator[Request | float, Any, T]
"""Yields a request, for which it is sent an Outcome, or a pause in seconds, for which it is sent None."""


@dataclass(frozen=True)
class Retries:
    base_url: str
    """Named in errors."""
    retry_seconds: float

    def exchange(self, make_request: Callable[[], Request], max_seconds: float = math.inf) -> Call[httpx2.Response]:
        """Send a request, and repeat it after a failure that may pass.

        Raises GatewayError: ConnectionLost also if an earlier attempt at a submission may have been served.
        """
        deadline = time.monotonic() + min(self.retry_seconds, max_seconds)
        attempts = 0
        was_lost = False
        while True:
            request = make_request()
            outcome: Outcome = yield request
            if isinstance(outcome, httpx2.Response) and outcome.is_success:
                return outcome
            error = self._to_error(outcome)
            attempts += 1
            pause = _retry_pause(error, attempts)
            if pause is None or time.monotonic() + pause > deadline:
                if was_lost and not errors.may_be_served(error) and not _is_final(error):
                    raise errors.ConnectionLost(f"An earlier attempt without a response may count; then: {error}")
                raise error
            was_lost = was_lost or (request.method == "POST" and errors.may_be_served(error))
            yield pause

    def _to_error(self, outcome: Outcome) -> GatewayError:
        if isinstance(outcome, httpx2.Response):
            retry_after = errors.parse_retry_after(outcome.headers.get("retry-after"))
            return errors.problem_error(outcome.status_code, outcome.content, retry_after)
        why = errors.single_line(str(outcome)) or type(outcome).__name__
        if isinstance(outcome, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
            # The reason may quote the header with the token.
            return errors.NotConfigured(f"{self.base_url} is not the address of a gateway, or a header is none")
        if isinstance(outcome, httpx2.ConnectError | httpx2.ConnectTimeout):
            return errors.NoConnection(f"Can't connect to {self.base_url}: {why}")
        return errors.ConnectionLost(f"The connection to {self.base_url} broke: {why}")


def _is_final(error: GatewayError) -> bool:
    """Return whether an error tells that no attempt at this request was served."""
    return isinstance(error, errors.InvalidRequest | errors.UpstreamRejected)


def _retry_pause(error: GatewayError, attempts: int) -> float | None:
    """Return the pause before the next attempt; None if none may succeed, or the caller has to act first."""
    retry_after: float | None = None
    match error:
        case errors.NoConnection():
            if attempts >= _MAX_CONNECT_ATTEMPTS:
                return None
        case errors.ConnectionLost():
            pass
        case errors.UnexpectedResponse(status=status):
            if status not in _PROXY_STATUSES:
                return None
        case errors.ProblemError():
            retry_after = error.retry_after
            is_limit = isinstance(error, errors.QuotaExceeded) and retry_after is not None
            if error.code not in _TRANSIENT_CODES and not is_limit:
                return None
        case _:
            return None
    backoff = min(_FIRST_BACKOFF_SECONDS * 2.0 ** min(attempts - 1, 10), _MAX_BACKOFF_SECONDS)
    return max(backoff * random.uniform(0.5, 1), retry_after or 0)  # noqa: S311 - spreads the load


@dataclass(frozen=True)
class Upload:
    """A submission. It is sent under `idempotency_key` until its outcome is known."""

    request: Request
    idempotency_key: str

    @classmethod
    def build(
        cls,
        kind: str,
        image: ImageSource | None,
        options: Mapping[str, Any],
        metadata: Mapping[str, str] | None,
        webhook_url: str | None,
        idempotency_key: str | None,
        image_url: str | None = None,
    ) -> Upload:
        """Read the image and encode the request.

        Raises OSError, and ValueError for a key that no header can have, or unless one of image and URL is given.
        """
        key = idempotency_key or str(uuid.uuid4())
        if not _KEY.fullmatch(key):
            raise ValueError("an idempotency key is 1 to 255 characters of ASCII")
        if (image is None) == (image_url is None):
            raise ValueError("a submission has an image or an image_url")
        escaped = key.replace("\\", r"\\").replace('"', r"\"")
        request = Request("POST", _path("tasks", kind), headers={"Idempotency-Key": f'"{escaped}"'})
        fields = {name: value for name, value in options.items() if value is not None}
        more = {"webhook_url": webhook_url} if webhook_url else {}
        if image is None:
            body = fields | more | {"image_url": image_url} | ({"metadata": dict(metadata)} if metadata else {})
            return cls(replace(request, json=body), key)
        form = {name: _encode_field(value) for name, value in fields.items()} | more
        form |= {"metadata": msgspec.json.encode(metadata).decode()} if metadata else {}
        return cls(replace(request, form=form, image=_read_image(image)), key)

    def submit(self, retries: Retries) -> Call[SubmittedTask]:
        """Raises GatewayError with the key. After those for which `may_be_served` is true the image may have been
        charged; the same key, within 24 hours, returns the outcome and never pays again.
        """
        try:
            response = yield from retries.exchange(lambda: self.request)
            task = yield from _read_accepted(retries, response)
        except GatewayError as error:
            error.idempotency_key = self.idempotency_key
            raise
        fields = msgspec.structs.asdict(task)
        is_replayed = response.headers.get("idempotent-replayed") == "true"
        return SubmittedTask(**fields, idempotency_key=self.idempotency_key, is_replayed=is_replayed)


def _read_accepted(retries: Retries, response: httpx2.Response) -> Call[Task]:
    # A gateway that fails after an acceptance still sends the id.
    try:
        return _decode(response, Task)
    except errors.UnexpectedResponse:
        with_id = _decode(response, _AcceptedId)
    try:
        return (yield from get_task(retries, with_id.id))
    except GatewayError as error:
        message = f"{with_id.id} was accepted, but can't be read: {error}"
        raise errors.UnexpectedResponse(message, response.status_code) from error


class _AcceptedId(msgspec.Struct, frozen=True):
    id: str


def get_task(retries: Retries, task_id: str) -> Call[Task]:
    response = yield from retries.exchange(lambda: Request("GET", _path("tasks", task_id)))
    return _decode(response, Task)


def wait_for_task(
    retries: Retries, task_id: str, timeout_seconds: float | None, on_update: Callable[[Task], None] | None
) -> Call[Task]:
    """Read a task until it has succeeded. Raises TaskFailed and WaitTimeout."""
    deadline = time.monotonic() + (math.inf if timeout_seconds is None else timeout_seconds)
    while True:
        remaining = deadline - time.monotonic()
        seconds = max(int(min(remaining, WAIT_SECONDS)), 1)
        headers = {"Prefer": f"wait={seconds}"}
        request = Request("GET", _path("tasks", task_id), headers=headers, extra_seconds=seconds)
        response = yield from retries.exchange(partial(replace, request), max(remaining, 0))
        task = _decode(response, Task)
        if on_update:
            on_update(task)
        if task.state == "failed":
            raise errors.TaskFailed(task)
        if task.has_ended:
            return task
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise errors.WaitTimeout(task)
        if "preference-applied" not in response.headers:
            pause = errors.parse_retry_after(response.headers.get("retry-after"))
            yield min(max(DEFAULT_PAUSE_SECONDS if pause is None else pause, MIN_PAUSE_SECONDS), remaining)


def list_tasks(retries: Retries, state: str | None, kind: str | None, limit: int | None) -> Call[list[Task]]:
    """Read the newest tasks, `limit` or all."""
    tasks: list[Task] = []
    query = {name: value for name, value in (("state", state), ("kind", kind)) if value}
    cursor: str | None = ""
    while cursor is not None and (limit is None or len(tasks) < limit):
        size = _MAX_PAGE_SIZE if limit is None else min(limit - len(tasks), _MAX_PAGE_SIZE)
        params = query | {"limit": str(size)} | ({"cursor": cursor} if cursor else {})
        page = yield from _get(retries, TaskPage, "tasks", **params)
        tasks += page.items
        cursor = page.next_cursor
    return tasks


def get_quota(retries: Retries) -> Call[Quota]:
    return _get(retries, Quota, "quota")


def get_submission(retries: Retries, submission_id: str) -> Call[Submission]:
    return _get(retries, Submission, "submissions", submission_id)


def get_usage(retries: Retries, query: Mapping[str, str]) -> Call[Usage]:
    return _get(retries, Usage, "usage", **query)


def get_usage_csv(retries: Retries, query: Mapping[str, str]) -> Call[str]:
    request = Request("GET", _path("usage"), headers={"Accept": "text/csv"}, params=query)
    response = yield from retries.exchange(lambda: request)
    if not response.headers.get("content-type", "").startswith("text/csv"):
        raise errors.UnexpectedResponse("The response is not CSV", response.status_code)
    return response.content.decode()


def _get(retries: Retries, schema: type[T], *parts: str, **query: str) -> Call[T]:
    response = yield from retries.exchange(lambda: Request("GET", _path(*parts), params=query))
    return _decode(response, schema)


def _path(*parts: str) -> str:
    """Return the path of a resource. Raises NotFound for ids that servers would take for another path."""
    for part in parts:
        if part in {"", ".", ".."} or "/" in part:
            raise errors.NotFound(404, errors.Problem("Not found", f"there is no {part!r}", "not-found"))
    return "/".join(["/v1", *(quote(part, safe="") for part in parts)])


def _decode(response: httpx2.Response, schema: type[T]) -> T:
    try:
        return msgspec.json.decode(response.content, type=schema)
    except msgspec.DecodeError as error:
        noun = "task" if schema is _AcceptedId else schema.__name__.lower()
        raise errors.UnexpectedResponse(f"The response is not a {noun}: {error}", response.status_code) from None


def _encode_field(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_image(image: ImageSource) -> tuple[str, bytes]:
    # All of it: it may be sent again.
    if isinstance(image, bytes):
        return "image", image
    if isinstance(image, str | os.PathLike):
        return Path(image).name, Path(image).read_bytes()
    return "image", image.read()
