"""Reading and awaiting tasks when the store or a client fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import structlog
from msgspec.structs import replace

from service.api import tasks as task_routes
from service.app import create_app
from service.domain.errors import NotFound, UpstreamUnavailable
from service.domain.ledger import ReservationState
from service.domain.tasks import State, Task
from service.telemetry import logging
from service.usecases import caches, task_status
from service.usecases.caches import CachedTask
from service.usecases.ports import CheckOutcome
from service.usecases.task_status import MAX_RECREATE_AGE_SECONDS, TaskReader
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.support.valkey import Valkey
from tests.unit.asgi_client import Message, make_http_scope
from tests.usecases.gateway_fixture import UNAVAILABLE, UseCases, run_job, wait_until

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
    gateway.faults.is_unavailable = True
    gateway.upstream.may_respond.clear()

    async def read() -> tuple[State, float]:
        with logging.measure_upstream_wait() as timer:
            result = await reader.read(gateway.tenant, task.id)
            assert result.age_seconds < 60
            return result.task.state, timer.seconds or 0

    reads = [asyncio.create_task(read()) for _ in range(5)]
    await wait_until(lambda: bool(gateway.upstream.checks))
    reads.pop(0).cancel()
    gateway.upstream.may_respond.set()
    for state, waited_seconds in await asyncio.gather(*reads):
        assert state is State.SUCCEEDED
        assert waited_seconds > 0
    await read()
    assert len(gateway.upstream.checks) == 1


async def test_query_during_an_outage_keeps_known_fields(gateway: UseCases) -> None:
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=0)
    await reader.read(gateway.tenant, task.id)
    gateway.faults.is_unavailable = True
    gateway.upstream.queue_checks(CheckOutcome.RUNNING)
    running, ended = [(await reader.read(gateway.tenant, task.id)).task for _ in range(2)]
    assert (running.state, ended.state) == (State.RUNNING, State.SUCCEEDED)
    assert running.metadata == ended.metadata == task.metadata
    assert ended.artifacts
    gateway.faults.is_unavailable = False
    assert (await reader.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    await wait_until(lambda: not reader._verifications)
    stored = await gateway.stored(task)
    assert stored
    assert stored.state is State.SUCCEEDED


@pytest.mark.parametrize("outcome", [CheckOutcome.NOT_FOUND, CheckOutcome.NO_RESPONSE])
async def test_unavailable_ledger_and_upstream_is_503(gateway: UseCases, outcome: CheckOutcome) -> None:
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=2.5)
    gateway.faults.is_unavailable = True
    gateway.upstream.queue_checks(outcome)
    with pytest.raises(UpstreamUnavailable) as caught:
        await reader.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS)
    assert caught.value.retry_after == 2.5
    assert gateway.cache.subscription_count == 0


async def test_lost_task_that_the_upstream_does_not_know(gateway: UseCases) -> None:
    task, reader = await gateway.submit_task(lost=True), gateway.make_reader(interval=0)
    gateway.upstream.queue_checks(CheckOutcome.NOT_FOUND)
    with pytest.raises(NotFound):
        await reader.read(gateway.tenant, task.id)
    await gateway.change_registry(drop_accounts=tuple(gateway.registry.current.accounts.values()))
    with pytest.raises(NotFound):
        await reader.read(gateway.tenant, task.id)
    assert len(gateway.upstream.checks) == 1
    assert await gateway.reservations() == {}


async def test_lost_task_is_recreated_once(gateway: UseCases) -> None:
    task, reader = await gateway.submit_task(lost=True), gateway.make_reader(interval=0)
    gateway.upstream.queue_checks(CheckOutcome.RUNNING)
    results = await asyncio.gather(*(reader.read(gateway.tenant, task.id) for _ in range(3)))
    assert [item.task.id for item in results] == [task.id] * 3
    assert await gateway.task_counts() == (1, 0, 1)
    await gateway.poll()
    assert (await reader.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert await gateway.task_counts() == (1, 0, 0)


async def test_failed_recreation_is_repeated_by_the_next_read(gateway: UseCases) -> None:
    task, reader = await gateway.submit_task(lost=True), gateway.make_reader(interval=0)
    gateway.faults.before["settle"] = [UNAVAILABLE]
    assert (await reader.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert await gateway.stored(task) is None
    await reader.read(gateway.tenant, task.id)
    await wait_until(lambda: not reader._verifications)
    assert await gateway.stored(task)


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


async def test_end_is_recorded_before_it_is_shown(gateway: UseCases) -> None:
    task, reader, other = (
        await gateway.submit_task(lost=True),
        gateway.make_reader(interval=0),
        gateway.make_reader(interval=0),
    )
    other.cache = caches.TaskCache(gateway.cache.durations)
    for process in (reader, other):
        assert (await process.read(gateway.tenant, task.id)).task.state is State.SUCCEEDED
    assert len(gateway.upstream.checks) == 1


async def test_many_waiters_cost_one_read_and_one_check_per_interval(gateway: UseCases) -> None:
    crowd = 2_000
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=LONG_SECONDS)
    gateway.upstream.queue_checks(CheckOutcome.RUNNING, CheckOutcome.RUNNING)
    waits = [asyncio.create_task(reader.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS)) for _ in range(crowd)]
    await wait_until(lambda: gateway.cache.subscription_count == crowd)
    for _ in range(3):
        await gateway.poll()
    assert {item.task.state for item in await asyncio.gather(*waits)} == {State.SUCCEEDED}
    assert len(gateway.upstream.checks) == 3
    assert count_touches(gateway) == 1


async def test_cancelled_reader_does_not_cancel_others(gateway: UseCases) -> None:
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=LONG_SECONDS)
    first, second = (asyncio.create_task(reader.read(gateway.tenant, task.id)) for _ in range(2))
    await wait_until(lambda: count_touches(gateway) == 1)
    first.cancel()
    assert (await second).task == task
    assert count_touches(gateway) == 1


async def test_end_recorded_during_the_read_is_noticed(gateway: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=LONG_SECONDS)
    touch = gateway.store.touch

    async def overtaken(reservations: Sequence[str]) -> Any:
        stored = await touch(reservations)
        await gateway.poll()
        return stored

    monkeypatch.setattr(gateway.store, "touch", overtaken)
    async with asyncio.timeout(60):
        result = await reader.read(gateway.tenant, task.id, wait_seconds=LONG_SECONDS)
    assert result.task.state is State.SUCCEEDED


async def test_older_version_of_the_store_is_not_shown(gateway: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=LONG_SECONDS)
    before = await gateway.store.touch([task.reservation])
    gateway.upstream.queue_checks(CheckOutcome.RUNNING)
    await reader.read(gateway.tenant, task.id)
    await gateway.poll()

    async def lag(_: Sequence[str]) -> Any:
        return before

    monkeypatch.setattr(gateway.store, "touch", lag)
    assert (await reader.read(gateway.tenant, task.id)).task.state is State.RUNNING


async def test_end_recorded_during_the_query_wins(gateway: UseCases) -> None:
    task, reader = await gateway.submit_task(), gateway.make_reader(interval=0)
    await reader.read(gateway.tenant, task.id)
    gateway.upstream.queue_checks(CheckOutcome.RUNNING)
    gateway.upstream.may_respond.clear()
    gateway.faults.is_unavailable = True
    reading = asyncio.create_task(reader.read(gateway.tenant, task.id))
    await wait_until(lambda: bool(gateway.upstream.checks))
    ended = replace(task, state=State.SUCCEEDED, version=2)
    gateway.cache.put(ended, gateway.now_ms)
    gateway.upstream.may_respond.set()
    assert (await reading).task is ended


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


async def test_only_watched_tasks_are_touched(gateway: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_status, "_BATCH_SIZE", 2)
    reader, tasks = gateway.make_reader(interval=0.001), [await gateway.submit_task() for _ in range(5)]
    for task in tasks[:2]:
        await reader.read(gateway.tenant, task.id)
    waits = [await start_wait(gateway, reader, task) for task in tasks[2:]]
    gateway.faults.calls.clear()
    async with run_job(reader.touch_watched()):
        await wait_until(lambda: count_touches(gateway) >= 2)
    first, second = [args[0] for _, args in gateway.faults.calls[:2]]
    assert sorted([*first, *second]) == sorted(task.reservation for task in tasks[2:])
    gateway.cache.close()
    await asyncio.gather(*waits)


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
    monkeypatch.setattr(task_routes, "WRITE_TIMEOUT_SECONDS", 0.01)
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
