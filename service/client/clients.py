"""The client in two forms, blocking and for asyncio."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx2

from service import __version__
from service.client import calls, downloads
from service.client.calls import Call, ImageSource, Outcome, Request, Retries, Upload
from service.client.downloads import Content, SavedFile
from service.client.errors import NotConfigured, single_line
from service.client.models import (
    Artifact,
    KindName,
    Quota,
    StateName,
    Submission,
    SubmittedTask,
    Task,
    TaskOptions,
    Usage,
)

T = TypeVar("T")
URL_VARIABLE, TOKEN_VARIABLE = "GATEWAY_URL", "GATEWAY_TOKEN"
DEFAULT_RETRY_SECONDS = 120.0
_CONNECT_SECONDS = 5.0
_TOKEN = re.compile(r"[!-~]+")
_USER_INFO = re.compile(r"[^/?#]*//[^/?#]*@")


class _BaseClient:
    # Where a gateway is, how it is called, and how requests are built.

    def __init__(self, base_url: str | None, token: str | None, retry_seconds: float, timeout_seconds: float) -> None:
        url = base_url or os.environ.get(URL_VARIABLE, "")
        if not url:
            raise NotConfigured(f"There is no address of a gateway: set {URL_VARIABLE}")
        self._token = (token or read_token()).strip()
        if not self._token:
            raise NotConfigured(f"There is no token: set {TOKEN_VARIABLE} or {TOKEN_VARIABLE}_FILE")
        if not _TOKEN.fullmatch(self._token):
            raise NotConfigured("The token is none: it has blanks, or characters that are not of ASCII")
        if _USER_INFO.match(url):
            raise NotConfigured(
                "The address of the gateway must not have a user or a password: the token stands for them"
            )
        self._url = single_line(url).rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._retries = Retries(self._url, retry_seconds)

    def _http_options(self) -> dict[str, Any]:
        # A proxy or a `.netrc` of the environment would receive or replace the token. To load the authorities of TLS
        # takes 0.1 s, so that where there is no TLS, a context without any is used, which trusts nothing.
        has_tls = not self._url.lower().startswith("http:")
        return {"trust_env": False} | ({} if has_tls else {"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)})

    def _build(self, http: httpx2.Client | httpx2.AsyncClient, request: Request) -> httpx2.Request:
        """Raises NotConfigured for an address or a token that HTTP does not allow."""
        seconds = self._timeout_seconds
        timeout = httpx2.Timeout(seconds, connect=_CONNECT_SECONDS, read=seconds + request.extra_seconds)
        identity = {"Authorization": f"Bearer {self._token}", "User-Agent": f"imaging-gateway-client/{__version__}"}
        try:
            return http.build_request(
                request.method,
                self._url + request.path,
                headers=identity | dict(request.headers),
                params=request.params or None,
                data=request.form,
                json=request.json,
                files={"image": request.image} if request.image else None,
                timeout=timeout,
            )
        except (httpx2.InvalidURL, UnicodeEncodeError) as error:
            raise NotConfigured(f"{self._url} is not the address of a gateway, or the token is none: {error}") from None


class GatewayClient(_BaseClient):
    """Client of a gateway with a tenant's token, for one thread. Its calls raise GatewayError.

        with GatewayClient() as gateway:
            task = gateway.wait(gateway.submit("upscale", "photo.jpg", scale=2))
            gateway.download(task, "photo-2x.png")

    Without arguments the address and the token are those of `GATEWAY_URL` and `GATEWAY_TOKEN` (or the file that
    `GATEWAY_TOKEN_FILE` names). A call is repeated after failures that cost nothing and may pass, for at most
    `retry_seconds`; 0 repeats none. `timeout_seconds` limits each pause of a response. `http` replaces the connections,
    with proxies, certificates and limits of your own; it is not closed.
    """

    def __init__(
        self,
        base_url: str | None = None,
        token: str | None = None,
        *,
        retry_seconds: float = DEFAULT_RETRY_SECONDS,
        timeout_seconds: float = 60.0,
        http: httpx2.Client | None = None,
    ) -> None:
        super().__init__(base_url, token, retry_seconds, timeout_seconds)
        self._own_http = None if http else httpx2.Client(**self._http_options())
        self._http = http or self._own_http or httpx2.Client()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._own_http:
            self._own_http.close()

    def submit(
        self,
        kind: KindName,
        image: ImageSource | None = None,
        *,
        image_url: str | None = None,
        metadata: Mapping[str, str] | None = None,
        webhook_url: str | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> SubmittedTask:
        """Submit an image (a path, bytes or an open file) and return its task, which has not ended yet.

        With `image_url` in its place the gateway fetches the image, if the operators have allowed you its host.
        However often it is repeated, it is paid for once: all attempts have one `Idempotency-Key`, by default a random
        one. Give a key of your own, such as the id of your order, if your program may call this again after it has
        crashed. Errors have the key as `idempotency_key`: repeat with it if `may_be_served` is true of the error, since
        then it may have been charged.
        """
        return self._run(
            Upload.build(kind, image, options, metadata, webhook_url, idempotency_key, image_url).submit(self._retries)
        )

    def get_task(self, task_id: str) -> Task:
        return self._run(calls.get_task(self._retries, task_id))

    def wait(
        self,
        task: Task | str,
        *,
        timeout_seconds: float | None = None,
        on_update: Callable[[Task], None] | None = None,
    ) -> Task:
        """Return a task, or that of an id, when it has succeeded. Raises TaskFailed, and WaitTimeout if it continues.

        The gateway holds the requests, so that the end is known at once. `on_update` gets the task as it is each time.
        """
        return self._run(calls.wait_for_task(self._retries, _id(task), timeout_seconds, on_update))

    def list_tasks(
        self, *, state: StateName | None = None, kind: KindName | None = None, limit: int | None = 20
    ) -> list[Task]:
        """Return the newest tasks; None is no limit."""
        return self._run(calls.list_tasks(self._retries, state, kind, limit))

    def download(self, task: Task, path: str | os.PathLike[str], *, name: str | None = None) -> SavedFile:
        """Write a result of a task to a file, which appears when it is complete and of the right type.

        `name` is image, vector or grid; by default the main result. A broken connection is resumed. Raises OSError,
        TaskFailed, and NoResult if there is none of this name.
        """
        return self._run(downloads.download(self._retries, task, path, name))

    def fetch_artifact(self, artifact: Artifact) -> Content:
        """Return a result in memory, as it is labelled."""
        return self._run(downloads.fetch_artifact(self._retries, artifact))

    def get_quota(self) -> Quota:
        return self._run(calls.get_quota(self._retries))

    def get_usage(self, **query: str) -> Usage:
        """Return the usage; `query` has the parameters of the API: `interval`, `group_by`, and `from_` and `to`."""
        return self._run(calls.get_usage(self._retries, _query(query)))

    def get_usage_csv(self, **query: str) -> str:
        return self._run(calls.get_usage_csv(self._retries, _query(query)))

    def get_submission(self, submission_id: str) -> Submission:
        """Return the outcome of a submission, such as that of `SubmissionUnknown`."""
        return self._run(calls.get_submission(self._retries, submission_id))

    def _run(self, call: Call[T]) -> T:
        outcome: Outcome | None = None
        with closing(call):
            while True:
                try:
                    step = call.send(outcome)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                if isinstance(step, Request):
                    outcome = self._send(step)
                else:
                    time.sleep(step)
                    outcome = None

    def _send(self, request: Request) -> Outcome:
        built, receiver = self._build(self._http, request), request.receiver
        try:
            response = self._http.send(built, stream=True)
            with closing(response):
                if receiver and response.is_success:
                    receiver.begin(response)
                    for chunk in response.iter_bytes():
                        receiver.write(chunk)
                else:
                    response.read()
            return response
        except httpx2.RequestError as error:
            return error


class AsyncGatewayClient(_BaseClient):
    """`GatewayClient` for asyncio: the same calls, as coroutines. Any number may run at once."""

    def __init__(
        self,
        base_url: str | None = None,
        token: str | None = None,
        *,
        retry_seconds: float = DEFAULT_RETRY_SECONDS,
        timeout_seconds: float = 60.0,
        http: httpx2.AsyncClient | None = None,
    ) -> None:
        super().__init__(base_url, token, retry_seconds, timeout_seconds)
        self._own_http = None if http else httpx2.AsyncClient(**self._http_options())
        self._http = http or self._own_http or httpx2.AsyncClient()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        if self._own_http:
            await self._own_http.aclose()

    async def submit(
        self,
        kind: KindName,
        image: ImageSource | None = None,
        *,
        image_url: str | None = None,
        metadata: Mapping[str, str] | None = None,
        webhook_url: str | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> SubmittedTask:
        upload = await asyncio.to_thread(
            Upload.build, kind, image, options, metadata, webhook_url, idempotency_key, image_url
        )
        return await self._run(upload.submit(self._retries))

    async def get_task(self, task_id: str) -> Task:
        return await self._run(calls.get_task(self._retries, task_id))

    async def wait(
        self,
        task: Task | str,
        *,
        timeout_seconds: float | None = None,
        on_update: Callable[[Task], None] | None = None,
    ) -> Task:
        return await self._run(calls.wait_for_task(self._retries, _id(task), timeout_seconds, on_update))

    async def list_tasks(
        self, *, state: StateName | None = None, kind: KindName | None = None, limit: int | None = 20
    ) -> list[Task]:
        return await self._run(calls.list_tasks(self._retries, state, kind, limit))

    async def download(self, task: Task, path: str | os.PathLike[str], *, name: str | None = None) -> SavedFile:
        return await self._run(downloads.download(self._retries, task, path, name))

    async def fetch_artifact(self, artifact: Artifact) -> Content:
        return await self._run(downloads.fetch_artifact(self._retries, artifact))

    async def get_quota(self) -> Quota:
        return await self._run(calls.get_quota(self._retries))

    async def get_usage(self, **query: str) -> Usage:
        return await self._run(calls.get_usage(self._retries, _query(query)))

    async def get_usage_csv(self, **query: str) -> str:
        return await self._run(calls.get_usage_csv(self._retries, _query(query)))

    async def get_submission(self, submission_id: str) -> Submission:
        return await self._run(calls.get_submission(self._retries, submission_id))

    async def _run(self, call: Call[T]) -> T:
        outcome: Outcome | None = None
        with closing(call):
            while True:
                try:
                    step = call.send(outcome)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                if isinstance(step, Request):
                    outcome = await self._send(step)
                else:
                    await asyncio.sleep(step)
                    outcome = None

    async def _send(self, request: Request) -> Outcome:
        built, receiver = self._build(self._http, request), request.receiver
        try:
            response = await self._http.send(built, stream=True)
            try:
                if receiver and response.is_success:
                    receiver.begin(response)
                    async for chunk in response.aiter_bytes():
                        receiver.write(chunk)
                else:
                    await response.aread()
            finally:
                await response.aclose()
            return response
        except httpx2.RequestError as error:
            return error


def read_token() -> str:
    """Return the token of the environment, empty if there is none. Raises NotConfigured for an unreadable file."""
    if token := os.environ.get(TOKEN_VARIABLE, ""):
        return token
    file = os.environ.get(f"{TOKEN_VARIABLE}_FILE", "")
    try:
        return Path(file).read_text(encoding="utf-8").strip() if file else ""
    except (OSError, ValueError) as error:
        raise NotConfigured(f"{TOKEN_VARIABLE}_FILE can't be read: {error}") from None


def _id(task: Task | str) -> str:
    return task if isinstance(task, str) else task.id


def _query(query: Mapping[str, str]) -> Mapping[str, str]:
    # `from` is a keyword of Python.
    return {name.rstrip("_"): value for name, value in query.items() if value}
