"""A fake gateway with the HTTP contract that the demo uses; it records its requests."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from litestar import Litestar, Request, Response, get, post
from litestar.datastructures import UploadFile
from litestar.params import FromPath

from tests.demo.results import Body, good_results
from tests.support.network import serve_app

TOKEN = "gw_demo"


@dataclass(frozen=True)
class ReceivedSubmission:
    kind: str
    filename: str
    content: bytes
    fields: Mapping[str, str]


@dataclass
class FakeGateway:
    """Set the fields before the demo runs; read `submissions`, `polls` and `tokens` afterwards."""

    states: dict[str, list[str]] = field(
        default_factory=lambda: defaultdict(lambda: ["queued", "running", "succeeded"])
    )
    """The states returned by successive reads, beginning with the submission; the last one repeats."""
    results: dict[str, dict[str, Body]] = field(default_factory=good_results)
    problems: dict[str, Response[Any]] = field(default_factory=dict)
    """Responses in place of the ordinary ones: by kind for a submission, else `quota`, `read` or `artifact`."""
    costs: dict[str, Any] = field(
        default_factory=lambda: defaultdict(lambda: {"count": 1, "money": 0, "basis": "observed"})
    )
    error: Any = None
    retry_after: str | None = "0"
    address: str = ""
    blocked_kind: str | None = None
    """A kind whose submission is answered only once `unblock` is set."""
    unblock: asyncio.Event = field(default_factory=asyncio.Event)
    submissions: dict[str, ReceivedSubmission] = field(default_factory=dict)
    polls: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """When each kind was read, in seconds of the monotonic clock, beginning with its submission."""
    tokens: dict[str, str | None] = field(default_factory=dict)
    request_received: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until requests make the condition true."""
        async with asyncio.timeout(20):
            while not condition():
                self.request_received.clear()
                await self.request_received.wait()

    def create_app(self) -> Litestar:
        return Litestar([self._quota(), self._submit(), self._read_task(), self._artifact()], openapi_config=None)

    def _quota(self) -> Any:
        @get("/v1/quota")
        async def quota(request: Request[Any, Any, Any]) -> Response[Any]:
            return self._problem_for("quota", request) or Response({"policies": []})

        return quota

    def _submit(self) -> Any:
        @post("/v1/tasks/{kind:str}")
        async def submit(request: Request[Any, Any, Any], kind: FromPath[str]) -> Response[Any]:
            form = await request.form()
            upload = form["image"]
            assert isinstance(upload, UploadFile)
            fields = {name: value for name, value in form.items() if name != "image"}
            self.submissions[kind] = ReceivedSubmission(kind, upload.filename, await upload.read(), fields)
            if kind == self.blocked_kind:
                await self.unblock.wait()
            return self._problem_for(kind, request) or self._task(kind, 201)

        return submit

    def _read_task(self) -> Any:
        @get("/v1/tasks/{task_id:str}")
        async def read(request: Request[Any, Any, Any], task_id: FromPath[str]) -> Response[Any]:
            return self._problem_for("read", request) or self._task(task_id.removeprefix("task_"), 200)

        return read

    def _artifact(self) -> Any:
        @get("/v1/tasks/{task_id:str}/artifacts/{name:str}")
        async def artifact(
            request: Request[Any, Any, Any], task_id: FromPath[str], name: FromPath[str]
        ) -> Response[Any]:
            content_type, content = self.results[task_id.removeprefix("task_")][name]
            refusal = self._problem_for("artifact", request)
            return refusal or Response(content, headers={"Content-Type": content_type})

        return artifact

    def _problem_for(self, what: str, request: Request[Any, Any, Any]) -> Response[Any] | None:
        self.tokens[request.url.path] = request.headers.get("authorization")
        self.request_received.set()
        return self.problems.get(what)

    def _task(self, kind: str, status: int) -> Response[Any]:
        states = self.states[kind]
        state = states[min(len(self.polls[kind]), len(states) - 1)]
        self.polls[kind].append(time.monotonic())
        self.request_received.set()
        ended = state in {"succeeded", "failed"}
        task = {
            "id": f"task_{kind}",
            "kind": kind,
            "state": state,
            "artifacts": self._artifacts(kind) if state == "succeeded" else [],
            "error": self.error if state == "failed" else None,
            "cost": self.costs[kind] if ended else None,
        }
        headers = {} if ended or self.retry_after is None else {"Retry-After": self.retry_after}
        return Response(task, status_code=status, headers=headers)

    def _artifacts(self, kind: str) -> list[dict[str, str]]:
        return [
            {"name": name, "href": f"/v1/tasks/task_{kind}/artifacts/{name}", "url": "http://127.0.0.1:1/"}
            for name in self.results[kind]
        ]


@asynccontextmanager
async def serve(gateway: FakeGateway) -> AsyncIterator[FakeGateway]:
    """Serve on a free port of localhost."""
    async with serve_app(gateway.create_app()) as gateway.address:
        yield gateway


def problem_response(status: int, title: str, detail: str) -> Response[Any]:
    document = {"type": "urn:x", "title": title, "status": status, "detail": detail, "code": "x"}
    return Response(document, status_code=status, headers={"Content-Type": "application/problem+json"})
