"""Programs written for the vendor's API, and clients that wait for a task."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from httpx2 import AsyncClient, Response, Timeout

from service.usecases.ports import CheckOutcome
from tests.behaviour.gateway_fixture import RunningGateway
from tests.support.images import make_png
from tests.usecases.gateway_fixture import ScriptedUpstream

SUBMIT_FIELDS: dict[str, dict[str, Any]] = {
    "submit_task": {
        "sdxl_model_dropdown": "通用模型",
        "style_dropdown": "通用风格",
        "prompt": "",
        "neg_prompt": "",
        "upscale": 1.0,
        "s_noise": 1.003,
        "steps": 30,
        "high_fidelity": False,
        "strong_inpaint": False,
        "strong_inpaint_intensity": 0.5,
        "vector_switch": True,
        "color_count": 5,
    },
    "submit_vector_task": {"color_count": 5},
    "submit_face_enhance_task": {},
    "submit_seamless_task": {"fit": 0.3},
}
"""The fields of the four submit calls."""

FINAL_STATUSES = {"Completed", "Failed", None}


@dataclass(frozen=True)
class LegacyClient:
    """A client of the vendor's API; every response must be 200 with a JSON object."""

    http: AsyncClient
    base: str
    key: str

    async def submit(self, call: str, fields: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """Submit an image with the documented fields, or with `fields` instead."""
        data = {"user_key": self.key} | dict(SUBMIT_FIELDS[call] if fields is None else fields)
        request: dict[str, Any] = {"data": data, "files": {"input_image": ("picture.png", make_png())}} | more
        return await self.post(call, timeout=Timeout(connect=5, read=10, write=30, pool=None), **request)

    async def check(self, task_id: str) -> dict[str, Any]:
        return await self.post("check_task_status", data={"user_key": self.key, "task_id": task_id})

    async def wait_for_end(self, task_id: str, pause: Callable[[], Awaitable[None]]) -> dict[str, Any]:
        for _ in range(20):
            status = await self.check(task_id)
            assert status["err_code"] == 0, status
            if status["status"] in FINAL_STATUSES:
                return status
            await pause()
        raise AssertionError("it is still running")

    async def post(self, call: str, **request: Any) -> dict[str, Any]:
        response = await self.http.post(f"{self.base}/api/{call}", **request)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/json"
        content: dict[str, Any] = response.json()
        return content


async def wait_until(condition: Callable[[], bool]) -> None:
    """Yield to the event loop until a condition holds."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def start_waiting_read(
    gateway: RunningGateway, path: str, seconds: int = 60, **headers: str
) -> asyncio.Task[Response]:
    """Start a read with `Prefer: wait`; return once it waits."""
    before = gateway.services.task_cache.subscription_count
    headers = {"Prefer": f"wait={seconds}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    reading = asyncio.create_task(gateway.call("GET", path, headers=headers))
    await wait_until(lambda: gateway.services.task_cache.subscription_count > before or reading.done())
    return reading


class Event(NamedTuple):
    name: str
    id: str
    task: dict[str, Any]


@dataclass
class EventStream:
    response: Response
    lines: AsyncIterator[str]
    retry_ms: int | None = None

    async def next_event(self) -> Event:
        """Return the next event; raise StopAsyncIteration at the end of the stream."""
        data: dict[str, str] = {}
        async with asyncio.timeout(20):
            while (line := await anext(self.lines)) or "data" not in data:
                name, _, value = line.partition(": ")
                if name == "retry":
                    self.retry_ms = int(value)
                elif name:
                    data[name] = value
        return Event(data["event"], data["id"], json.loads(data["data"]))

    async def wait_for_comment(self) -> None:
        """Wait for a comment; fail on an event before it."""
        async with asyncio.timeout(20):
            while not (line := await anext(self.lines)).startswith(":"):
                assert not line or line.startswith("retry")

    async def read_remaining(self) -> list[Event]:
        events = []
        with suppress(StopAsyncIteration):
            while True:
                events.append(await self.next_event())
        return events


@asynccontextmanager
async def open_event_stream(
    gateway: RunningGateway, task: dict[str, Any], last: str | None = None
) -> AsyncIterator[EventStream]:
    """Open the event stream of a task, after the event id `last`."""
    headers = {"Authorization": f"Bearer {gateway.token}"} | ({} if last is None else {"Last-Event-ID": last})
    async with gateway.http.stream("GET", gateway.url + task["links"]["events"], headers=headers) as response:
        yield EventStream(response, response.aiter_lines())


async def poll_with_outcome(gateway: RunningGateway, outcome: CheckOutcome) -> None:
    """Advance one poll interval; the upstream responds with this outcome."""
    upstream = ScriptedUpstream()
    upstream.queue_checks(outcome)
    gateway.services.task_poller.upstream = upstream
    await gateway.poll_due_tasks()
