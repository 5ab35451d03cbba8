"""Two processes on one Redis: concurrent changes of the registry, and notifications of tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from service.app import create_app
from service.container import open_container
from service.domain.errors import NotFound
from service.domain.tasks import Kind
from service.domain.tenants import Tenant
from service.settings import Settings
from service.storage.connections import connect
from service.storage.redis import Keys
from service.usecases.admin import RegistryAdmin, SavedTenant
from service.usecases.ports import RegistryChange
from service.usecases.registry_plan import DesiredTenant
from tests.behaviour.clients import open_event_stream, start_waiting_read, wait_until
from tests.behaviour.gateway_fixture import ENVIRONMENT, RunningGateway, run_real_gateway
from tests.behaviour.requests import expect_problem
from tests.support.network import serve_app
from tests.support.valkey import Valkey


@dataclass
class TwoProcesses:
    """Two processes, of which only one polls."""

    poller: RunningGateway
    reader: RunningGateway


@pytest.fixture
async def processes(valkey: Valkey) -> AsyncIterator[TwoProcesses]:
    async with AsyncExitStack() as stack:
        own = await stack.enter_async_context(run_real_gateway(valkey))
        environment = {
            "GATEWAY_REDIS_URL": valkey.url,
            "GATEWAY_UPSTREAM_URL": "http://127.0.0.1:9",
            "GATEWAY_ROLE": "api",
            "GATEWAY_POLL_SECONDS": "60",  # longer than a test: waiters are woken by notifications only
        }
        apart = await stack.enter_async_context(open_container(Settings.load(ENVIRONMENT | environment)))
        url = await stack.enter_async_context(serve_app(create_app(apart)))
        await stack.enter_async_context(apart.run_jobs())
        connections = connect(valkey.url, timeout=5)
        stack.push_async_callback(connections.aclose)
        channel = Keys("gw").task_events_channel
        async with asyncio.timeout(20):
            while not apart.registry.is_ready or dict(await connections.commands.pubsub_numsub(channel)) != {
                channel.encode(): 1
            }:
                await asyncio.sleep(0.001)
        yield TwoProcesses(
            own, RunningGateway(url, own.ops_url, own.http, apart, own.upstream, own.advance_time, own.token)
        )


async def save_tenant(admin: RegistryAdmin, name: str) -> SavedTenant:
    return await admin.save_tenant(name, lambda _: DesiredTenant(Tenant(id=0, name=name, accounts=("main",))))


async def test_end_recorded_elsewhere_wakes_waiters_and_updates_the_cache(processes: TwoProcesses) -> None:
    reader = processes.reader
    waited, cached = [(await processes.poller.submit()).json() for _ in range(2)]
    reading = await start_waiting_read(reader, waited["links"]["self"])
    assert (await reader.call("GET", cached["links"]["self"])).json()["state"] == "queued"
    async with open_event_stream(reader, waited) as stream:
        await stream.next_event()
        assert reader.services.task_cache.subscription_count == 2
        await processes.poller.poll_due_tasks()
        assert [event.task["state"] for event in await stream.read_remaining()] == ["succeeded"]
    assert (await reading).json()["state"] == "succeeded"
    await wait_until(lambda: all(entry.task.state.is_final for entry in reader.services.task_cache._tasks.values()))
    assert (await reader.call("GET", cached["links"]["self"])).json()["state"] == "succeeded"
    assert list(reader.services.task_cache.durations._seconds) == [Kind.FACE_ENHANCE]


async def test_concurrent_changes_are_all_kept(processes: TwoProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = processes.poller.services.registry_admin, processes.reader.services.registry_admin
    names = [f"tenant-{number}" for number in range(20)]
    made = await asyncio.gather(*(save_tenant((one, other)[number % 2], name) for number, name in enumerate(names)))
    assert {tenant.name for tenant in await one.list_tenants()} == {"shop", *names}
    assert await other.list_tenants() == await one.list_tenants()
    assert len({item.tenant.id for item in made}) == len(names)
    await other.delete_tenant(names[0], force=False)
    with pytest.raises(NotFound):
        await one.get_tenant(names[0])

    store = one.registry.store
    write = store.write

    async def write_second(change: RegistryChange) -> bool:
        monkeypatch.undo()
        await save_tenant(other, "theirs")
        return await write(change)

    monkeypatch.setattr(store, "write", write_second)
    await save_tenant(one, "ours")
    tenants = {item.name: item.id for item in await one.list_tenants()}
    assert {"theirs", "ours"} <= tenants.keys()
    assert len(set(tenants.values())) == len(tenants)


async def test_tenant_recreated_meanwhile_is_not_deleted(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = gateway.services.registry_admin.ledger
    read_snapshot = ledger.tenant_snapshot

    async def recreate_and_read(tenant_id: int) -> Any:
        monkeypatch.undo()
        await gateway.call_admin("DELETE", "/tenants/shop")
        await gateway.put_tenant()
        return await read_snapshot(tenant_id)

    monkeypatch.setattr(ledger, "tenant_snapshot", recreate_and_read)
    expect_problem(await gateway.call_admin("DELETE", "/tenants/shop"), 409, "conflict")
    assert (await gateway.call_admin("GET", "/tenants/shop")).status_code == 200


async def test_lasting_contention(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_: RegistryChange) -> bool:
        return False

    monkeypatch.setattr(gateway.services.registry.store, "write", refuse)
    response = await gateway.call_admin("PUT", "/tenants/new", json={"accounts": ["main"]})
    expect_problem(response, 503, "overloaded")
    expect_problem(await gateway.call_admin("GET", "/tenants/new"), 404, "not-found")


async def test_document_is_not_applied_to_a_newer_version(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = gateway.services.registry.store
    write = store.write

    async def write_second(change: RegistryChange) -> bool:
        monkeypatch.undo()
        await write(RegistryChange(version=change.version, next_id=change.next_id))
        return await write(change)

    monkeypatch.setattr(store, "write", write_second)
    document = {"tenants": {"new": {"accounts": ["main"]}}}
    expect_problem(await gateway.call_admin("PUT", "/registry", json=document), 412, "outdated")
    expect_problem(await gateway.call_admin("GET", "/tenants/new"), 404, "not-found")
