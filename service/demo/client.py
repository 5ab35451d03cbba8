"""A client of the gateway's public API."""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Annotated, Any

import httpx2
import msgspec

DEFAULT_PAUSE_SECONDS = 1.0


LEAST_PAUSE_SECONDS = 0.1


class GatewayError(Exception):
    """The gateway could not be asked, or refused; the message is one line for a person."""


class Artifact(msgspec.Struct, frozen=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
    """Becomes part of a file's name, hence the narrow alphabet."""
    href: Annotated[str, msgspec.Meta(pattern=r"^/(?!/)")]
    """On the gateway: the token is for nobody else."""


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
    def ended(self) -> bool:
        return self.state in {"succeeded", "failed"}


class Sighting(msgspec.Struct, frozen=True):
    """A task as one answer showed it, and how long to wait before asking again."""

    task: Task
    pause_seconds: float


class File(msgspec.Struct, frozen=True):
    content: bytes
    content_type: str
    """Without parameters, in lower case."""


class _Problem(msgspec.Struct, frozen=True):
    title: str
    detail: str = ""


class Gateway:
    """One tenant's view of a gateway. Every method raises `GatewayError`; none sends anything twice."""

    def __init__(self, http: httpx2.AsyncClient, token: str) -> None:
        self._http = http
        self._authorization = {"Authorization": f"Bearer {token}"}

    async def knock(self) -> None:
        """Find out, before anything is paid for, whether a gateway answers and takes the token."""
        await self._ask("GET", "/v1/quota")

    async def submit(self, kind: str, picture: tuple[str, bytes], options: Mapping[str, str]) -> Sighting:
        """Submit a picture, given as its file name and content. This is what costs."""
        return _sighting(await self._ask("POST", f"/v1/tasks/{kind}", data=dict(options), files={"image": picture}))

    async def look(self, task_id: str) -> Sighting:
        return _sighting(await self._ask("GET", f"/v1/tasks/{task_id}"))

    async def fetch(self, artifact: Artifact) -> File:
        """Fetch a result through the gateway."""
        response = await self._ask("GET", artifact.href)
        content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        return File(response.content, content_type)

    async def _ask(self, method: str, address: str, **content: Any) -> httpx2.Response:
        try:
            response = await self._http.request(method, address, headers=self._authorization, **content)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise GatewayError(
                f"No gateway answers at {_shown(self._http.base_url)} — start it with `make run`"
            ) from error
        except httpx2.UnsupportedProtocol as error:
            raise GatewayError(f"{_shown(self._http.base_url)} is not the address of a gateway") from error
        except httpx2.RequestError as error:
            raise GatewayError(f"The connection to the gateway broke: {_reason(error)}") from error
        if not response.is_success:
            raise GatewayError(_refusal(response))
        return response


@asynccontextmanager
async def connect(base_url: str, token: str, timeout_seconds: float) -> AsyncIterator[Gateway]:
    """Open a client of the gateway at `base_url`; no single answer may take longer than `timeout_seconds`."""
    try:
        http = httpx2.AsyncClient(base_url=base_url, timeout=httpx2.Timeout(timeout_seconds, connect=5.0))
    except httpx2.InvalidURL as error:
        raise GatewayError(f"{plain(base_url)} is not the address of a gateway") from error
    async with http:
        yield Gateway(http, token)


def plain(text: str) -> str:
    """Bring text from elsewhere onto one line, without anything that steers a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _shown(base_url: httpx2.URL) -> str:
    return plain(str(base_url)).rstrip("/")


def _reason(error: Exception) -> str:
    return plain(str(error)) or type(error).__name__


def _sighting(response: httpx2.Response) -> Sighting:
    try:
        task = msgspec.json.decode(response.content, type=Task)
    except msgspec.DecodeError as error:
        raise GatewayError(f"The answer is not a task: {_reason(error)}") from error
    return Sighting(task, _pause(response.headers.get("retry-after")))


def _pause(retry_after: str | None) -> float:
    """Read `Retry-After`, which is a number of seconds or a date; unreadable is as good as absent."""
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
    return max(seconds, LEAST_PAUSE_SECONDS)


def _refusal(response: httpx2.Response) -> str:
    try:
        problem = msgspec.json.decode(response.content, type=_Problem)
    except msgspec.DecodeError:
        return f"HTTP {response.status_code} without a problem document: is this a gateway?"
    return plain(": ".join(filter(None, (problem.title, problem.detail))))
