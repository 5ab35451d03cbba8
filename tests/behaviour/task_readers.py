"""Clients that wait for a task or read its event stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from httpx2 import Response

from service.usecases.ports import CheckOutcome
from tests.behaviour.gateway_fixture import RunningGateway
from tests.usecases.gateway_fixture import ScriptedUpstream


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


@dataclass(frozen=True)
class Event:
    name: str
    id: str
    task: dict[str, Any]


@dataclass
class EventStream:
    response: Response
    lines: AsyncIterator[str]
    comment_count: int = 0
    retry_ms: int | None = None
    _data: dict[str, str] = field(default_factory=dict)

    async def next_event(self) -> Event | None:
        """Return the next event, or None at the end of the stream."""
        async with asyncio.timeout(20):
            async for line in self.lines:
                name, _, value = line.partition(": ")
                if line.startswith(":"):
                    self.comment_count += 1
                elif name == "retry":
                    self.retry_ms = int(value)
                elif line:
                    assert name not in self._data
                    self._data[name] = value
                elif self._data:
                    data, self._data = self._data, {}
                    return Event(data["event"], data["id"], json.loads(data["data"]))
        return None

    async def wait_for_comment(self) -> None:
        """Wait for a comment; fail on an event before it."""
        async with asyncio.timeout(20):
            async for line in self.lines:
                if line.startswith(":"):
                    return
                assert not line or line.startswith("retry")
        raise AssertionError("the stream has ended")

    async def read_remaining(self) -> list[Event]:
        events = []
        while event := await self.next_event():
            events.append(event)
        return events


@asynccontextmanager
async def open_event_stream(
    gateway: RunningGateway, task: dict[str, Any], last: str | None = None
) -> AsyncIterator[EventStream]:
    """Open the event stream of a task, after the event id `last`."""
    headers = {"Authorization": f"Bearer {gateway.token}"} | ({} if last is None else {"Last-Event-ID": last})
    async with gateway.http.stream("GET", gateway.url + task["links"]["events"], headers=headers) as response:
        yield EventStream(response, response.aiter_lines())


async def poll_with_outcomes(gateway: RunningGateway, *responses: CheckOutcome) -> None:
    """Advance one poll interval for each outcome, with which the upstream responds."""
    for outcome in responses:
        upstream = ScriptedUpstream()
        upstream.queue_checks(outcome)
        gateway.services.task_poller.upstream = upstream
        await gateway.poll_due_tasks()
