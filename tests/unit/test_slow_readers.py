"""A reader of events that is slow, or reads nothing, costs no memory, and is not kept for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import structlog
from msgspec.structs import replace

from service.api import tasks
from service.app import create_app
from service.domain.tasks import State
from service.usecases.task_cache import Seen
from tests.behaviour.house import House, house_of_fakes
from tests.unit.asgi import Message, http_scope
from tests.unit.over_fakes import until


@dataclass
class Reader:
    """A client whose connection takes as many messages as it is told to, and which never leaves."""

    house: House
    seen: Seen
    bodies: list[bytes] = field(default_factory=list)
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    waiting: int = 0

    async def read(self) -> None:
        """Follow the task."""
        headers = {"Authorization": f"Bearer {self.house.token}"}
        path = f"/v1/tasks/{self.seen.task.id}/events"
        await create_app(self.house.services)(http_scope("GET", path, headers), self._receive, self._send)

    async def _receive(self) -> Message:
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    async def _send(self, message: Message) -> None:
        self.waiting += 1
        await self.room.acquire()
        self.waiting -= 1
        self.bodies.append(message.get("body", b""))

    def post(self, version: int, **changes: Any) -> None:
        """Let the task change."""
        task = replace(self.seen.task, version=version, **changes)
        self.house.services.board.announced(task, self.seen.now + version)


@pytest.fixture
async def reader() -> AsyncIterator[Reader]:
    """A reader of a task that runs."""
    async with house_of_fakes() as (house, ledger, _):
        await house.submit()
        (task,) = ledger.tasks.values()
        yield Reader(house, Seen(task, ledger.clock.at, 0))


async def test_only_the_newest(reader: Reader) -> None:
    """However much happens while a client reads nothing, only what is newest then waits for it."""
    reading = asyncio.create_task(reader.read())
    reader.room.release()
    await until(lambda: len(reader.bodies) == 1 and reader.waiting == 1)
    for version in range(2, 1_000):
        reader.post(version, state=State.RUNNING)
    reader.post(1_000, state=State.FAILED)
    for _ in range(10):
        reader.room.release()
    await reading
    ids = [body.partition(b"id: ")[2].split(b"\n")[0] for body in reader.bodies]
    assert ids == [b"", b"1-queued", b"1000-failed", b""]


@pytest.mark.parametrize("taken", [0, 1, 2])
async def test_nothing_is_taken(reader: Reader, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    """A client that takes nothing for long enough is cut off, at whatever point, and holds nothing any more."""
    monkeypatch.setattr(tasks, "WRITE_SECONDS", 0.01)
    for _ in range(taken):
        reader.room.release()
    with structlog.testing.capture_logs() as lines:
        reading = asyncio.create_task(reader.read())
        await until(lambda: reader.house.services.board.waiting == 1)
        await until(lambda: len(reader.bodies) == taken)
        reader.post(2, state=State.RUNNING)
        async with asyncio.timeout(20):
            await reading
    assert [line["outcome"] for line in lines if line["event"] == "request.ended"] == ["client-stuck"]
    assert reader.house.services.board.waiting == 0
