"""A client of the gateway's public API."""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Annotated, Any

import httpx2
import msgspec

DEFAULT_PAUSE_SECONDS = 1.0
MIN_PAUSE_SECONDS = 0.1


class GatewayError(Exception):
    """A request failed or was refused; the message is one line."""


class Artifact(msgspec.Struct, frozen=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
    """Part of a file name, hence the narrow alphabet."""
    href: Annotated[str, msgspec.Meta(pattern=r"^/(?!/)")]
    """A path on the gateway: the token must not be sent elsewhere."""


class Cost(msgspec.Struct, frozen=True):
    count: int | None = None
    money: float | None = None
    """In yuan."""
    basis: str = "unknown"


class Task(msgspec.Struct, frozen=True):
    id: str
    state: str
    artifacts: tuple[Artifact, ...] = ()
    error: Any = None
    cost: Cost | None = None

    @property
    def is_finished(self) -> bool:
        return self.state in {"succeeded", "failed"}


class PollResult(msgspec.Struct, frozen=True):
    """A task, and the pause before the next poll."""

    task: Task
    pause_seconds: float


class ResultFile(msgspec.Struct, frozen=True):
    content: bytes
    content_type: str
    """Without parameters, in lower case."""


class _ProblemDocument(msgspec.Struct, frozen=True):
    title: str
    detail: str = ""


class GatewayClient:
    """Client with a tenant's token. Every method raises `GatewayError`; none repeats a request."""

    def __init__(self, http: httpx2.AsyncClient, token: str) -> None:
        self._http = http
        self._authorization = {"Authorization": f"Bearer {token}"}

    async def ping(self) -> None:
        """Check the address and the token, at no cost."""
        await self._request("GET", "/v1/quota")

    async def submit(self, kind: str, image: tuple[str, bytes], options: Mapping[str, str]) -> PollResult:
        """Submit an image, given as its file name and content. This call costs money."""
        return _parse_task(await self._request("POST", f"/v1/tasks/{kind}", data=dict(options), files={"image": image}))

    async def get_task(self, task_id: str) -> PollResult:
        return _parse_task(await self._request("GET", f"/v1/tasks/{task_id}"))

    async def fetch_artifact(self, artifact: Artifact) -> ResultFile:
        response = await self._request("GET", artifact.href)
        content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        return ResultFile(response.content, content_type)

    async def _request(self, method: str, address: str, **content: Any) -> httpx2.Response:
        url = single_line(str(self._http.base_url)).rstrip("/")
        try:
            response = await self._http.request(method, address, headers=self._authorization, **content)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise GatewayError(f"Can't connect to {url} — start a gateway with `make run`") from error
        except httpx2.UnsupportedProtocol as error:
            raise GatewayError(f"{url} is not the address of a gateway") from error
        except httpx2.RequestError as error:
            raise GatewayError(f"The connection to the gateway broke: {_error_text(error)}") from error
        if not response.is_success:
            raise GatewayError(_problem_text(response))
        return response


@asynccontextmanager
async def open_client(base_url: str, token: str, timeout_seconds: float) -> AsyncIterator[GatewayClient]:
    """Open a client; `timeout_seconds` limits each response. Raises GatewayError."""
    try:
        http = httpx2.AsyncClient(base_url=base_url, timeout=httpx2.Timeout(timeout_seconds, connect=5.0))
    except httpx2.InvalidURL as error:
        raise GatewayError(f"{single_line(base_url)} is not the address of a gateway") from error
    async with http:
        yield GatewayClient(http, token)


def single_line(text: str) -> str:
    """Join text onto one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _error_text(error: Exception) -> str:
    return single_line(str(error)) or type(error).__name__


def _parse_task(response: httpx2.Response) -> PollResult:
    try:
        task = msgspec.json.decode(response.content, type=Task)
    except msgspec.DecodeError as error:
        raise GatewayError(f"The response is not a task: {_error_text(error)}") from error
    return PollResult(task, _parse_retry_after(response.headers.get("retry-after")))


def _parse_retry_after(retry_after: str | None) -> float:
    """Parse seconds or a date; a default replaces a missing or invalid value."""
    if retry_after is None:
        return DEFAULT_PAUSE_SECONDS
    try:
        seconds = (
            float(retry_after)
            if retry_after.isdecimal()
            else parsedate_to_datetime(retry_after).timestamp() - time.time()
        )
    except ValueError:
        return DEFAULT_PAUSE_SECONDS
    return max(seconds, MIN_PAUSE_SECONDS)


def _problem_text(response: httpx2.Response) -> str:
    try:
        problem = msgspec.json.decode(response.content, type=_ProblemDocument)
    except msgspec.DecodeError:
        return f"HTTP {response.status_code} without a problem document: is this a gateway?"
    return single_line(": ".join(filter(None, (problem.title, problem.detail))))
