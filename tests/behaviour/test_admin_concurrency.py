"""Concurrent changes of the registry by several processes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog

from service.container import open_container
from service.domain.errors import NotFound
from service.domain.tenants import Tenant
from service.settings import Settings
from service.usecases.admin import RegistryAdmin, SavedTenant
from service.usecases.ports import RegistryChange
from service.usecases.registry_plan import DesiredTenant
from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import SECRET_KEY, RunningGateway, run_fake_gateway, run_real_gateway
from tests.support.valkey import Valkey


@asynccontextmanager
async def run_two_processes(valkey: Valkey) -> AsyncIterator[tuple[RegistryAdmin, RegistryAdmin]]:
    """Yield the admin use cases of two processes on one Redis."""
    settings = Settings.load(
        {
            "GATEWAY_REDIS_URL": valkey.url,
            "GATEWAY_UPSTREAM_URL": "http://127.0.0.1:9",
            "GATEWAY_SECRET_KEYS": base64.b64encode(SECRET_KEY).decode(),
            "GATEWAY_ADMIN_TOKEN": "of-another-process",
        }
    )
    async with run_real_gateway(valkey) as gateway, open_container(settings) as other:
        yield gateway.services.registry_admin, other.registry_admin


async def save_tenant(admin: RegistryAdmin, name: str) -> SavedTenant:
    return await admin.save_tenant(name, lambda _: DesiredTenant(Tenant(id=0, name=name, accounts=("main",))))


async def test_concurrent_changes_are_all_kept(valkey: Valkey) -> None:
    async with run_two_processes(valkey) as (one, other):
        names = [f"tenant-{number}" for number in range(20)]
        made = await asyncio.gather(*(save_tenant((one, other)[number % 2], name) for number, name in enumerate(names)))
        assert {tenant.name for tenant in await one.list_tenants()} == {"shop", *names}
        assert await other.list_tenants() == await one.list_tenants()
        assert len({item.tenant.id for item in made}) == len(names)


async def test_conflicting_change_is_retried(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_two_processes(valkey) as (one, other):
        write = one.registry.store.write

        async def forestalled(change: RegistryChange) -> bool:
            monkeypatch.undo()
            await save_tenant(other, "theirs")
            return await write(change)

        monkeypatch.setattr(one.registry.store, "write", forestalled)
        await save_tenant(one, "ours")
        tenants = await one.list_tenants()
        assert {item.name for item in tenants} == {"shop", "theirs", "ours"}
        assert len({item.id for item in tenants}) == 3


async def test_changes_are_visible_in_other_processes(valkey: Valkey) -> None:
    async with run_two_processes(valkey) as (one, other):
        assert [tenant.name for tenant in await other.list_tenants()] == ["shop"]
        await save_tenant(one, "new")
        assert (await other.get_tenant("new")).name == "new"
        await other.delete_tenant("new", force=False)
        with pytest.raises(NotFound):
            await one.get_tenant("new")


async def test_recreated_tenant_is_not_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_fake_gateway() as (gateway, ledger, _):
        counters = ledger.tenant_snapshot

        async def meanwhile(tenant_id: int) -> Any:
            monkeypatch.undo()
            await gateway.call_admin("DELETE", "/tenants/shop")
            await gateway.put_tenant()
            return await counters(tenant_id)

        monkeypatch.setattr(ledger, "tenant_snapshot", meanwhile)
        expect_problem(await gateway.call_admin("DELETE", "/tenants/shop"), 409, "conflict")
        assert (await gateway.call_admin("GET", "/tenants/shop")).status_code == 200


async def iter_admin_calls(gateway: RunningGateway) -> AsyncIterator[tuple[str, str, Any]]:
    """Iterate over valid calls of all admin routes."""
    (token,) = (await gateway.call_admin("GET", "/tenants/shop")).json()["tokens"]
    for method, path, body in (
        ("PUT", "/accounts/main", {}),
        ("PUT", "/accounts/new", {"user_key": "new"}),
        ("GET", "/accounts", None),
        ("GET", "/accounts/main", None),
        ("POST", "/accounts/main/reopen", None),
        ("DELETE", "/accounts/main?force=true", None),
        ("PUT", "/tenants/shop", {"accounts": ["main"]}),
        ("GET", "/tenants", None),
        ("GET", "/tenants/shop", None),
        ("DELETE", "/tenants/shop?force=true", None),
        ("POST", "/tenants/shop/tokens", {}),
        ("DELETE", f"/tenants/shop/tokens/{token['id']}", None),
        ("GET", "/registry", None),
        ("PUT", "/registry", {}),
    ):
        yield method, path, body


async def test_unavailable_store_is_503_and_changes_nothing() -> None:
    async with run_fake_gateway() as (gateway, ledger, _):
        calls = [call async for call in iter_admin_calls(gateway)]
        before = gateway.services.registry.current
        ledger.is_unavailable = True
        with structlog.testing.capture_logs() as events:
            for method, path, body in calls:
                response = await gateway.call_admin(method, path, json=body)
                expect_problem(response, 503, "ledger-unavailable")
                assert int(response.headers["retry-after"]) > 0
        assert {event["event"] for event in events} == {"request.ended"}
        ledger.is_unavailable = False
        assert gateway.services.registry.current is before


async def test_new_token_is_shown_if_redis_fails_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_fake_gateway() as (gateway, ledger, _):
        registry: Any = gateway.services.registry
        write = registry.write

        async def last_words(change: Any) -> bool:
            written: bool = await write(change)
            ledger.is_unavailable = True
            return written

        monkeypatch.setattr(registry, "write", last_words)
        with structlog.testing.capture_logs() as events:
            response = await gateway.call_admin("POST", "/tenants/shop/tokens")
        assert response.status_code == 201
        assert [event["id"] for event in events if event["event"] == "token.created"] == [response.json()["id"]]
        ledger.is_unavailable = False
        assert (await gateway.call("GET", "/v1/quota", token=response.json()["token"])).status_code == 200


async def test_contention_is_reported_as_overload(monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_fake_gateway() as (gateway, _, _):

        async def stale(_: Any) -> bool:
            return False

        monkeypatch.setattr(gateway.services.registry, "write", stale)
        response = await gateway.call_admin("PUT", "/tenants/new", json={"accounts": ["main"]})
        expect_problem(response, 503, "overloaded")
        expect_problem(await gateway.call_admin("GET", "/tenants/new"), 404, "not-found")
