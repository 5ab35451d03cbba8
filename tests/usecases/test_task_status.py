"""Reading and awaiting tasks when the store or a client fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec.structs import replace

from service.app import create_app
from service.domain.errors import NotFound, UpstreamUnavailable
from service.domain.ledger import ReservationState
from service.domain.tasks import State, Task
from service.usecases import caches, task_status
from service.usecases.caches import DurationEstimator, TaskCache
from service.usecases.ports import CheckOutcome, RangeRequest
from service.usecases.task_status import MAX_RECREATE_AGE_SECONDS, NEW_TASK_SECONDS, TaskReader
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.support.valkey import Valkey
from tests.unit.asgi_client import Message, make_http_scope
from tests.usecases.gateway_fixture import UNAVAILABLE, URL, UseCases, run_job, wait_until

LONG_SECONDS = 1e6
"""Longer than any test."""


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store confirm each task that is read."""
    monkeypatch.setattr(caches, "RUNNING_TTL_SECONDS", -1)
    monkeypatch.setattr(caches, "FINISHED_TTL_SECONDS", -1)


def count_touches(gateway: UseCases) -> int:
    return sum(name == "touch" for name, _ in gateway.faults.calls)


async def test_one_query_per_interval_is_shared_and_outlives_its_caller(gateway: UseCases) -> None:
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=LONG_SECONDS)
    await reader.read(gateway.tenant, task.id)
    gateway.faults.is_unavailable = True
    gateway.upstream.may_respond.clear()

    reads = [asyncio.create_task(reader.read(gateway.tenant, task.id)) for _ in range(5)]
    await wait_until(lambda: bool(gateway.upstream.checks))
    reads.pop(0).cancel()
    gateway.upstream.may_respond.set()
    for item in await asyncio.gather(*reads):
        assert item.task.state is State.SUCCEEDED
        assert item.task.metadata == task.metadata  # which a task's id does not contain
    await reader.read(gateway.tenant, task.id)
    assert len(gateway.upstream.checks) == 1


async def test_results_are_found_that_another_process_recorded(
    gateway: UseCases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "RUNNING_TTL_SECONDS", LONG_SECONDS)
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=LONG_SECONDS)
    no_bytes: Any = nullcontext()
    reader.fetch_artifact = lambda *_: no_bytes
    await reader.read(gateway.tenant, task.id)
    gateway.poller.cache = TaskCache(DurationEstimator(2.5))
    await gateway.poll()
    assert (await reader.read(gateway.tenant, task.id)).task.state is State.QUEUED
    async with reader.open_artifact(gateway.tenant, task.id, "image", RangeRequest()) as (ended, _):
        assert ended.state is State.SUCCEEDED


async def test_unavailable_ledger_and_upstream_is_503(gateway: UseCases) -> None:
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=2.5)
    gateway.faults.is_unavailable = True
    gateway.upstream.queue_checks(CheckOutcome.NO_RESPONSE)
    with pytest.raises(UpstreamUnavailable) as caught:
        await reader.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS)
    assert caught.value.retry_after == 2.5
    assert gateway.cache.subscription_count == 0


async def test_lost_task_that_the_upstream_does_not_know(gateway: UseCases) -> None:
    task, reader = await gateway.submit_task(lost=True), gateway.make_reader(interval=0)
    gateway.upstream.queue_checks(CheckOutcome.NOT_FOUND, CheckOutcome.NOT_FOUND)
    with pytest.raises(UpstreamUnavailable):  # it may not be settled yet
        await reader.read(gateway.tenant, task.id)
    await gateway.advance(NEW_TASK_SECONDS * 1000)
    with pytest.raises(NotFound):
        await reader.read(gateway.tenant, task.id)
    await gateway.change_registry(drop_accounts=tuple(gateway.registry.current.accounts.values()))
    with pytest.raises(NotFound):
        await reader.read(gateway.tenant, task.id)
    assert len(gateway.upstream.checks) == 2
    assert await gateway.reservations() == {}


async def test_lost_task_is_recreated_once(gateway: UseCases) -> None:
    await gateway.set_webhook(url=URL)
    task, reader = await gateway.submit_task(lost=True), gateway.make_reader(interval=0)
    gateway.upstream.queue_checks(*[CheckOutcome.RUNNING] * 2)
    gateway.faults.before["settle"] = [UNAVAILABLE]
    assert (await reader.read(gateway.tenant, task.id)).task.state is State.RUNNING
    assert await gateway.stored(task) is None
    results = await asyncio.gather(*(reader.read(gateway.tenant, task.id) for _ in range(3)))
    assert [item.task.id for item in results] == [task.id] * 3
    assert await gateway.task_counts() == (1, 0, 1)
    await gateway.poll()
    assert (await reader.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert await gateway.task_counts() == (1, 0, 0)
    await gateway.deliver()
    assert [url for url, _, _ in gateway.receivers.sent] == [URL]


async def test_read_does_not_settle_before_the_sender(gateway: UseCases) -> None:
    gateway.faults.before["settle"] = [UNAVAILABLE] * 100
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=0)
    await gateway.background.drain(0)
    gateway.faults.before.clear()
    gateway.upstream.queue_checks(*[CheckOutcome.RUNNING] * 2)
    await reader.read(gateway.tenant, task.id)
    assert (await gateway.reservations())[task.reservation].state is ReservationState.RESERVED
    await gateway.advance(gateway.retention.lease_ms)
    await reader.read(gateway.tenant, task.id)
    assert (await gateway.reservations())[task.reservation].state is ReservationState.ACCEPTED


async def test_expired_task_is_shown_but_not_recreated(gateway: UseCases) -> None:
    task, reader = await gateway.submit_task(lost=True), gateway.make_reader(interval=0)
    await gateway.advance(MAX_RECREATE_AGE_SECONDS * 1000)
    assert (await reader.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert await gateway.stored(task) is None


async def test_remembered_queries_are_bounded(gateway: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_status, "_MAX_QUERIES", 2)
    tasks = [await gateway.submit_task() for _ in range(3)]
    reader = gateway.make_reader(interval=LONG_SECONDS)
    gateway.faults.is_unavailable = True
    gateway.upstream.queue_checks(*[CheckOutcome.RUNNING] * 4)
    for index, checks in [(0, 1), (1, 2), (2, 3), (2, 3), (0, 4)]:
        await reader.read(gateway.tenant, tasks[index].id)
        assert len(gateway.upstream.checks) == checks


@pytest.mark.parametrize("is_restored", [False, True])
async def test_cached_end_is_recorded_again(gateway: UseCases, is_restored: bool) -> None:
    """The store lost the task, or was restored to a copy from before its end."""
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=0)
    keys = [gateway.keys.task(task.reservation), gateway.keys.reservation(task.reservation)]
    before = [await gateway.client.dump(key) for key in keys]
    await gateway.poll()
    ended = (await reader.read(gateway.tenant, task.id)).task
    await gateway.lose_tasks()
    if is_restored:
        for key, value in zip(keys, before, strict=True):
            await gateway.client.restore(key, 0, value)
    for _ in range(2):
        assert (await reader.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
        await wait_until(lambda: not reader._verifications)
    stored = await gateway.stored(task)
    assert stored
    assert (stored.id, stored.state, stored.artifacts) == (task.id, State.SUCCEEDED, ended.artifacts)
    assert (await gateway.reservations())[task.reservation].cost


async def test_many_waiters_cost_one_read_and_one_check_per_interval(gateway: UseCases) -> None:
    crowd = 300
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=LONG_SECONDS)
    gateway.upstream.queue_checks(CheckOutcome.RUNNING, CheckOutcome.RUNNING)
    waits = [asyncio.create_task(reader.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS)) for _ in range(crowd)]
    await wait_until(lambda: gateway.cache.subscription_count == crowd)
    for _ in range(3):
        await gateway.poll()
    assert {item.task.state for item in await asyncio.gather(*waits)} == {State.SUCCEEDED}
    assert len(gateway.upstream.checks) == 3
    assert count_touches(gateway) == 1


async def test_tasks_that_are_read_at_the_same_time_cost_one_call(gateway: UseCases) -> None:
    tasks, reader = [await gateway.submit_task() for _ in range(3)], gateway.make_reader(interval=LONG_SECONDS)
    read = await asyncio.gather(*(reader.read(gateway.tenant, task.id) for task in tasks))
    assert [cached.task for cached in read] == tasks
    assert count_touches(gateway) == 1
    assert not reader._reads


async def test_a_damaged_task_does_not_fail_others_that_are_read_at_the_same_time(gateway: UseCases) -> None:
    tasks, reader = [await gateway.submit_task() for _ in range(3)], gateway.make_reader(interval=LONG_SECONDS)
    await gateway.client.set(gateway.keys.task(tasks[0].reservation), b"damaged")
    reads = (reader.read(gateway.tenant, task.id) for task in tasks)
    damaged, *read = await asyncio.gather(*reads, return_exceptions=True)
    assert isinstance(damaged, Exception)
    assert [item.task for item in read if not isinstance(item, BaseException)] == tasks[1:]


async def test_cancelled_reader_does_not_cancel_others(gateway: UseCases) -> None:
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=LONG_SECONDS)
    first, second = (asyncio.create_task(reader.read(gateway.tenant, task.id)) for _ in range(2))
    await wait_until(lambda: count_touches(gateway) == 1)
    first.cancel()
    assert (await second).task == task
    assert count_touches(gateway) == 1


async def start_wait(gateway: UseCases, reader: TaskReader, task: Task) -> asyncio.Task[Any]:
    before = count_touches(gateway)
    wait = asyncio.create_task(reader.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS))
    await wait_until(lambda: count_touches(gateway) > before and not reader._reads)
    return wait


async def test_missed_notification_is_found_later(gateway: UseCases) -> None:
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=0.001)
    wait = await start_wait(gateway, reader, task)
    gateway.poller.cache = caches.TaskCache(gateway.cache.durations)
    await gateway.poll()
    gateway.faults.is_unavailable = True
    async with run_job(reader.touch_watched()):
        await wait_until(lambda: count_touches(gateway) >= 4)
        assert not wait.done()
        gateway.faults.is_unavailable = False
        assert (await wait).task.state is State.SUCCEEDED


@pytest.mark.parametrize("ends", [True, False])
async def test_task_lost_during_the_wait_still_ends(gateway: UseCases, ends: bool) -> None:
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=0.001)
    changes = reader.stream_changes(gateway.tenant, task.id, after_version=1, max_seconds=LONG_SECONDS)
    assert await anext(changes) is None
    results = [await start_wait(gateway, reader, task), asyncio.create_task(anext(changes))]
    await gateway.lose_tasks()
    if not ends:
        gateway.upstream.queue_checks(CheckOutcome.RUNNING)
    async with run_job(reader.touch_watched()), asyncio.timeout(60):
        while not await gateway.stored(task):
            await asyncio.sleep(0.001)
        if not ends:
            await gateway.poll()
        assert [(await item).task.state for item in results] == [State.SUCCEEDED] * 2
    assert await gateway.task_counts() == (1, 0, 0)
    await changes.aclose()
    assert reader._subscribed == {}


@dataclass
class SlowReader:
    """A client that reads the events of a task; its connection accepts only the permitted number of messages."""

    gateway: RunningGateway
    task: Task
    bodies: list[bytes] = field(default_factory=list)
    send_permits: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    async def read(self) -> None:
        headers = {"Authorization": f"Bearer {self.gateway.token}"}
        scope = make_http_scope("GET", f"/v1/tasks/{self.task.id}/events", headers)
        await create_app(self.gateway.services)(scope, asyncio.Event().wait, self._send)

    async def _send(self, message: Message) -> None:
        await self.send_permits.acquire()
        self.bodies.append(message.get("body", b""))

    def publish_change(self, version: int, state: State) -> None:
        known_at = self.task.created_at + version
        self.gateway.services.task_cache.on_published(replace(self.task, version=version, state=state), known_at)


@pytest.fixture
async def reader(valkey: Valkey) -> AsyncIterator[SlowReader]:
    async with run_real_gateway(valkey) as gateway:
        task_id = (await gateway.submit()).json()["id"]
        tenant = gateway.services.registry.current.tenants["shop"]
        yield SlowReader(gateway, (await gateway.services.task_reader.read(tenant, task_id)).task)


async def test_only_the_newest_event_is_queued(reader: SlowReader) -> None:
    reading = asyncio.create_task(reader.read())
    await wait_until(lambda: len(reader.bodies) == 1 and reader.send_permits.locked())
    for version in range(2, 1_000):
        reader.publish_change(version, State.RUNNING)
    reader.publish_change(1_000, State.FAILED)
    for _ in range(10):
        reader.send_permits.release()
    await reading
    ids = [body.partition(b"id: ")[2].split(b"\n")[0] for body in reader.bodies]
    assert (ids[0], ids[-2:], len(ids) <= 4) == (b"", [b"1000-failed", b""], True)
