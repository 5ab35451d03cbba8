"""Slow readers of event streams."""

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
from service.usecases.caches import CachedTask
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.support.valkey import Valkey
from tests.unit.asgi_client import Message, make_http_scope
from tests.usecases.gateway_fixture import wait_until


@dataclass
class SlowReader:
    """A client whose connection accepts only the permitted number of messages."""

    gateway: RunningGateway
    cached_task: CachedTask
    bodies: list[bytes] = field(default_factory=list)
    send_permits: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    waiting_sends: int = 0

    async def read(self) -> None:
        headers = {"Authorization": f"Bearer {self.gateway.token}"}
        path = f"/v1/tasks/{self.cached_task.task.id}/events"
        await create_app(self.gateway.services)(make_http_scope("GET", path, headers), self._receive, self._send)

    async def _receive(self) -> Message:
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    async def _send(self, message: Message) -> None:
        self.waiting_sends += 1
        await self.send_permits.acquire()
        self.waiting_sends -= 1
        self.bodies.append(message.get("body", b""))

    def publish_change(self, version: int, **changes: Any) -> None:
        task = replace(self.cached_task.task, version=version, **changes)
        self.gateway.services.task_cache.on_published(task, self.cached_task.known_at + version)


@pytest.fixture
async def reader(valkey: Valkey) -> AsyncIterator[SlowReader]:
    async with run_real_gateway(valkey) as gateway:
        task_id = (await gateway.submit()).json()["id"]
        tenant = gateway.services.registry.current.tenants["shop"]
        yield SlowReader(gateway, await gateway.services.task_reader.read(tenant, task_id))


async def test_only_the_newest_event_is_queued(reader: SlowReader) -> None:
    reading = asyncio.create_task(reader.read())
    reader.send_permits.release()
    await wait_until(lambda: len(reader.bodies) == 1 and reader.waiting_sends == 1)
    for version in range(2, 1_000):
        reader.publish_change(version, state=State.RUNNING)
    reader.publish_change(1_000, state=State.FAILED)
    for _ in range(10):
        reader.send_permits.release()
    await reading
    ids = [body.partition(b"id: ")[2].split(b"\n")[0] for body in reader.bodies]
    assert ids == [b"", b"1-queued", b"1000-failed", b""]


@pytest.mark.parametrize("accepted", [0, 1, 2])
async def test_stalled_reader_is_disconnected(
    reader: SlowReader, monkeypatch: pytest.MonkeyPatch, accepted: int
) -> None:
    monkeypatch.setattr(tasks, "WRITE_TIMEOUT_SECONDS", 0.01)
    for _ in range(accepted):
        reader.send_permits.release()
    with structlog.testing.capture_logs() as lines:
        reading = asyncio.create_task(reader.read())
        await wait_until(lambda: reader.gateway.services.task_cache.subscription_count == 1)
        await wait_until(lambda: len(reader.bodies) == accepted)
        reader.publish_change(2, state=State.RUNNING)
        async with asyncio.timeout(20):
            await reading
    assert [line["outcome"] for line in lines if line["event"] == "request.ended"] == ["client-stalled"]
    assert reader.gateway.services.task_cache.subscription_count == 0
