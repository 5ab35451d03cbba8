"""A Redis that several processes change, that is away, or that lost data."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError  # noqa: A004

from service.app import create_app
from service.container import open_container
from service.domain.errors import NotFound
from service.domain.tenants import Registry, Tenant
from service.settings import Settings
from service.storage.redis import Keys, RedisScripts
from service.storage.registry import RedisRegistry
from service.usecases.admin import RegistryAdmin, SavedTenant
from service.usecases.ports import RegistryChange
from service.usecases.registry_plan import DesiredTenant
from tests.behaviour.clients import open_event_stream, start_waiting_read
from tests.behaviour.gateway_fixture import ENVIRONMENT, RunningGateway, reject_store_calls
from tests.behaviour.requests import expect_problem, read_all_usage, run_task
from tests.support.network import serve_app
from tests.support.valkey import Valkey

KEYS = Keys("gw")


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[Any]:
    async with Redis(unix_socket_path=str(valkey.socket_path)) as client:
        yield client


@pytest.fixture
async def reader(gateway: RunningGateway, valkey: Valkey, store: Any) -> AsyncIterator[RunningGateway]:
    """Run a second process, which does not poll."""
    environment = {
        "GATEWAY_REDIS_URL": valkey.url,
        "GATEWAY_UPSTREAM_URL": "http://127.0.0.1:9",
        "GATEWAY_ROLE": "api",
        "GATEWAY_POLL_SECONDS": "60",  # longer than a test: waiters are woken by notifications only
    }
    async with AsyncExitStack() as stack:
        services = await stack.enter_async_context(open_container(Settings.load(ENVIRONMENT | environment)))
        url = await stack.enter_async_context(serve_app(create_app(services)))
        await stack.enter_async_context(services.run_jobs())
        async with asyncio.timeout(20):
            while not services.registry.is_ready or not (await store.pubsub_numsub(KEYS.task_events_channel))[0][1]:
                await asyncio.sleep(0.001)
        upstream, advance_time = gateway.upstream, gateway.advance_time
        yield RunningGateway(url, gateway.ops_url, gateway.http, services, upstream, advance_time, gateway.token)


async def test_end_recorded_elsewhere_wakes_waiters(gateway: RunningGateway, reader: RunningGateway) -> None:
    task = (await gateway.submit()).json()
    reading = await start_waiting_read(reader, task["links"]["self"])
    async with open_event_stream(reader, task) as stream:
        await stream.next_event()
        await gateway.poll_due_tasks()
        assert [event.task["state"] for event in await stream.read_remaining()] == ["succeeded"]
    assert (await reading).json()["state"] == "succeeded"


async def save_tenant(admin: RegistryAdmin, name: str) -> SavedTenant:
    return await admin.save_tenant(name, lambda _: DesiredTenant(Tenant(id=0, name=name, accounts=("main",))))


async def test_concurrent_changes_are_all_kept(gateway: RunningGateway, reader: RunningGateway) -> None:
    one, other = gateway.services.registry_admin, reader.services.registry_admin
    names = [f"tenant-{number}" for number in range(20)]
    made = await asyncio.gather(*(save_tenant((one, other)[number % 2], name) for number, name in enumerate(names)))
    assert {tenant.name for tenant in await one.list_tenants()} == {"shop", *names}
    assert await other.list_tenants() == await one.list_tenants()
    assert len({item.tenant.id for item in made}) == len(names)
    await other.delete_tenant(names[0], force=False)
    with pytest.raises(NotFound):
        await one.get_tenant(names[0])


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


async def test_other_changes_win(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    store = gateway.services.registry.store
    write = store.write

    async def write_second(change: RegistryChange) -> bool:
        await write(RegistryChange(version=change.version, next_id=change.next_id))
        return await write(change)

    monkeypatch.setattr(store, "write", write_second)
    document = {"tenants": {"new": {"accounts": ["main"]}}}
    expect_problem(await gateway.call_admin("PUT", "/registry", json=document), 412, "outdated")
    response = await gateway.call_admin("PUT", "/tenants/new", json={"accounts": ["main"]})
    expect_problem(response, 503, "overloaded")  # after some attempts
    expect_problem(await gateway.call_admin("GET", "/tenants/new"), 404, "not-found")


async def test_unreachable_store(gateway: RunningGateway, valkey: Valkey) -> None:
    created = await gateway.submit()
    path = created.headers["location"]
    before = gateway.services.registry.current
    calls: list[tuple[str, str, Any]] = [
        ("PUT", "/accounts/new", {"user_key": "new"}),
        ("GET", "/accounts", None),
        ("POST", "/accounts/main/reopen", None),
        ("DELETE", "/tenants/shop?force=true", None),
        ("POST", "/tenants/shop/tokens", {}),
        ("GET", "/registry", None),
        ("PUT", "/registry", {}),
    ]
    with reject_store_calls(valkey):
        assert (await gateway.http.get(f"{gateway.url}/readyz")).status_code == 200
        await gateway.upstream.wait_until_idle()
        from_upstream = await gateway.call("GET", path, headers={"If-None-Match": created.headers["etag"]})
        assert (from_upstream.status_code, from_upstream.json()["state"]) == (200, "succeeded")
        condition = {"If-None-Match": from_upstream.headers["etag"]}
        assert (await gateway.call("GET", path, headers=condition)).status_code == 304
        refused = [await gateway.submit()]
        refused += [await gateway.call_admin(method, path, json=body) for method, path, body in calls]
        for response in refused:
            expect_problem(response, 503, "ledger-unavailable")
            assert int(response.headers["retry-after"]) > 0
        metrics = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
        assert "\ngateway_redis_up 0.0" in metrics
        assert 'gateway_tasks_submitted_total{kind="face-enhance",tenant="shop"} 1.0' in metrics
        for name in ("tenants", "tasks_active", "account_state", "poll_tasks", "webhooks_failed"):
            assert f"\ngateway_{name}" not in metrics
    assert gateway.services.registry.current is before
    assert "\ngateway_redis_up 1.0" in (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
    assert (await gateway.wait_for_task(created.json()["id"]))["state"] == "succeeded"
    assert await gateway.upstream.count_submits() == 1


async def test_new_token_is_shown_although_the_store_fails_afterwards(
    gateway: RunningGateway, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = gateway.services.registry.store
    write = store.write
    with ExitStack() as outage:

        async def write_last(change: RegistryChange) -> bool:
            is_written = await write(change)
            outage.enter_context(reject_store_calls(valkey))
            return is_written

        monkeypatch.setattr(store, "write", write_last)
        gateway.token = await gateway.new_token()
    await gateway.services.registry.refresh()
    assert (await gateway.call("GET", "/v1/quota")).status_code == 200


async def read_spending_tenants(gateway: RunningGateway) -> list[tuple[str, int]]:
    return [(item["tenant"], item["charged"]["tasks"]) for item in (await read_all_usage(gateway))["items"]]


async def test_deletions_survive_a_restored_or_lost_registry(gateway: RunningGateway, store: Any) -> None:
    await run_task(gateway)
    dump = await store.dump(KEYS.registry)
    await gateway.call_admin("DELETE", "/tenants/shop")
    deleted = gateway.services.registry.current
    await store.restore(KEYS.registry, 0, dump, replace=True)
    assert await read_spending_tenants(gateway) == [("shop", 1)]
    assert gateway.services.registry.current.tenants == {}
    await gateway.put_tenant()
    gateway.token = await gateway.new_token()
    await run_task(gateway)
    held = gateway.services.registry.current
    await store.restore(KEYS.registry, 0, dump, replace=True)
    assert await read_spending_tenants(gateway) == [("shop", 1), ("shop", 1)]
    assert gateway.services.registry.current.tenants == held.tenants
    await store.delete(KEYS.registry)
    assert await read_spending_tenants(gateway) == [("shop", 1), ("shop", 1)]
    stored = await RedisRegistry(RedisScripts(store), KEYS).load()
    assert stored.deleted_tenant_names == held.deleted_tenant_names == deleted.deleted_tenant_names
    assert list(held.deleted_tenant_names.values()) == ["shop"]


async def test_restored_registry_brings_back_no_token_and_keeps_new_tenants(
    gateway: RunningGateway, store: Any
) -> None:
    """Tenants that another process created in older data are replaced by those that this process holds."""
    revoked = await gateway.new_token()
    dump = await store.dump(KEYS.registry)
    token = (await gateway.call_admin("GET", "/tenants/shop")).json()["tokens"][-1]
    assert (await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{token['id']}")).status_code == 204
    for name in ("later", "another"):
        await gateway.put_tenant(name)
    held = gateway.services.registry.current
    await store.restore(KEYS.registry, 0, dump, replace=True)
    other_process = RedisRegistry(RedisScripts(store), KEYS)
    old, first = await other_process.load(), held.next_id + 1
    created = tuple(Tenant(first + number, name, ("main",)) for number, name in enumerate(("later", "late")))
    assert await other_process.write(RegistryChange(version=old.version, next_id=first + 2, tenants=created))
    await gateway.services.registry.refresh()
    assert gateway.services.registry.current.tenants == held.tenants
    assert gateway.services.registry.current.deleted_tenant_names == {first: "later", first + 1: "late"}
    assert (await gateway.call("GET", "/v1/quota", token=revoked)).status_code == 401
    assert (await gateway.call("GET", "/v1/quota")).status_code == 200


@pytest.mark.parametrize(("is_subscribed", "seconds"), [(True, 2), (False, 5)])
async def test_revocation_reaches_other_processes(
    gateway: RunningGateway,
    reader: RunningGateway,
    store: Any,
    monkeypatch: pytest.MonkeyPatch,
    is_subscribed: bool,
    seconds: float,
) -> None:
    """A wait there ends in time, later if no process can subscribe to changes."""

    async def fail(*_: Any) -> None:
        raise ConnectionError

    reading = await start_waiting_read(reader, (await gateway.submit()).json()["links"]["self"])
    if not is_subscribed:
        monkeypatch.setattr(PubSub, "subscribe", fail)
        await store.client_kill_filter(_type="pubsub")
    async with asyncio.timeout(seconds):
        await gateway.call_admin("POST", "/tenants/shop/revoke-all")
        expect_problem(await reading, 401, "unauthenticated")


async def test_slow_read_of_the_registry(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that ends after a later one does not bring a revoked token back."""
    registry, released = gateway.services.registry, asyncio.Event()
    load = registry.store.load

    async def load_slowly() -> Registry:
        loaded = await load()
        await released.wait()
        return loaded

    monkeypatch.setattr(registry.store, "load", load_slowly)
    registry.is_ready = False  # so that it is read although it has not changed
    reading = asyncio.create_task(registry.refresh())
    await asyncio.sleep(0)
    monkeypatch.undo()
    await registry.refresh()
    await gateway.call_admin("POST", "/tenants/shop/revoke-all")
    released.set()
    await reading
    expect_problem(await gateway.call("GET", "/v1/quota"), 401, "unauthenticated")
