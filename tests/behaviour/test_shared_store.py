"""A Redis that is away or lost data."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from service.storage.redis import Keys, RedisScripts
from service.storage.registry import RedisRegistry
from service.usecases.ports import RegistryChange
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.requests import expect_problem, read_all_usage, run_task
from tests.support.valkey import Valkey

KEYS = Keys("gw")


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[Any]:
    async with Redis(unix_socket_path=str(valkey.socket_path)) as client:
        await client.ping()  # its connection outlives `unreachable`
        yield client


@asynccontextmanager
async def unreachable(valkey: Valkey, store: Any) -> AsyncIterator[None]:
    """Close all connections to the store and refuse new ones within the block."""
    hidden = valkey.socket_path.with_suffix(".hidden")
    valkey.socket_path.rename(hidden)
    try:
        await store.client_kill_filter(skipme=True)
        yield
    finally:
        hidden.rename(valkey.socket_path)


async def test_unreachable_store(gateway: RunningGateway, valkey: Valkey, store: Any) -> None:
    created = await gateway.submit()
    path = created.headers["location"]
    (token,) = (await gateway.call_admin("GET", "/tenants/shop")).json()["tokens"]
    before = gateway.services.registry.current
    calls: list[tuple[str, str, Any]] = [
        ("PUT", "/accounts/main", {}),
        ("PUT", "/accounts/new", {"user_key": "new"}),
        ("PATCH", "/accounts/main", {}),
        ("GET", "/accounts", None),
        ("POST", "/accounts/main/reopen", None),
        ("DELETE", "/accounts/main?force=true", None),
        ("PUT", "/tenants/shop", {"accounts": ["main"]}),
        ("GET", "/tenants/shop", None),
        ("DELETE", "/tenants/shop?force=true", None),
        ("POST", "/tenants/shop/tokens", {}),
        ("DELETE", f"/tenants/shop/tokens/{token['id']}", None),
        ("GET", "/registry", None),
        ("PUT", "/registry", {}),
    ]
    async with unreachable(valkey, store):
        assert (await gateway.http.get(f"{gateway.url}/readyz")).status_code == 200
        await gateway.upstream.wait_until_idle()
        condition = {"If-None-Match": created.headers["etag"]}
        from_upstream = await gateway.call("GET", path, headers=condition)
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


async def test_new_token_is_shown_if_the_store_fails_afterwards(
    gateway: RunningGateway, valkey: Valkey, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = gateway.services.registry.store.write
    async with AsyncExitStack() as stack:

        async def write_and_fail(change: RegistryChange) -> bool:
            written = await write(change)
            await stack.enter_async_context(unreachable(valkey, store))
            return written

        monkeypatch.setattr(gateway.services.registry.store, "write", write_and_fail)
        with capture_logs() as events:
            response = await gateway.call_admin("POST", "/tenants/shop/tokens")
        assert response.status_code == 201
        assert [event["id"] for event in events if event["event"] == "token.created"] == [response.json()["id"]]
    await gateway.services.registry.refresh()
    assert (await gateway.call("GET", "/v1/quota", token=response.json()["token"])).status_code == 200


async def read_spending_tenants(gateway: RunningGateway) -> list[tuple[str, int]]:
    return [(item["tenant"], item["charged"]["tasks"]) for item in (await read_all_usage(gateway))["items"]]


@pytest.fixture
async def dump_before(gateway: RunningGateway, store: Any) -> bytes:
    """Delete the tenant `shop` after a task of it; return the registry as it was before."""
    await run_task(gateway)
    dump: bytes = await store.dump(KEYS.registry)
    await gateway.call_admin("DELETE", "/tenants/shop")
    return dump


async def test_deletions_survive_a_restored_or_lost_registry(
    gateway: RunningGateway, store: Any, dump_before: bytes
) -> None:
    deleted = gateway.services.registry.current
    await store.restore(KEYS.registry, 0, dump_before, replace=True)
    assert await read_spending_tenants(gateway) == [("shop", 1)]
    assert gateway.services.registry.current.tenants == {}
    await gateway.put_tenant()
    gateway.token = await gateway.new_token()
    await run_task(gateway)
    held = gateway.services.registry.current
    await store.restore(KEYS.registry, 0, dump_before, replace=True)
    assert await read_spending_tenants(gateway) == [("shop", 1), ("shop", 1)]
    assert gateway.services.registry.current.tenants == held.tenants
    await store.delete(KEYS.registry)
    assert await read_spending_tenants(gateway) == [("shop", 1), ("shop", 1)]
    stored = await RedisRegistry(RedisScripts(store), KEYS).load()
    assert stored.deleted_tenant_names == held.deleted_tenant_names == deleted.deleted_tenant_names
    assert list(held.deleted_tenant_names.values()) == ["shop"]


async def test_tenant_created_after_a_loss_keeps_its_name(
    gateway: RunningGateway, store: Any, dump_before: bytes
) -> None:
    await gateway.put_tenant("shop")
    held = gateway.services.registry.current
    await store.restore(KEYS.registry, 0, dump_before, replace=True)
    other_process = RedisRegistry(RedisScripts(store), KEYS)
    old = await other_process.load()
    (shop,) = old.tenants.values()
    others = {"shop": held.next_id + 1, "late": held.next_id + 2}
    made = tuple(type(shop)(id=number, name=name, accounts=("main",)) for name, number in others.items())
    assert await other_process.write(RegistryChange(version=old.version, next_id=held.next_id + 3, tenants=made))
    await gateway.services.registry.refresh()
    now = gateway.services.registry.current
    assert now.tenants == held.tenants
    expected = {**held.deleted_tenant_names, others["shop"]: "shop", others["late"]: "late"}
    assert now.deleted_tenant_names == expected
