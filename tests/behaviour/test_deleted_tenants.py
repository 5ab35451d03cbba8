"""Names of deleted tenants survive every loss of the store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.storage.connections import connect
from service.storage.redis import Keys, RedisScripts
from service.storage.registry import RedisRegistry
from service.usecases.ports import RegistryChange
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.behaviour.usage_requests import read_all_usage, run_task
from tests.support.valkey import Valkey

KEYS = Keys("gw")


@asynccontextmanager
async def gateway_with_deleted_tenant(valkey: Valkey) -> AsyncIterator[tuple[RunningGateway, Any, bytes]]:
    """Run a gateway and delete a tenant that spent; yield Redis and the registry dumped before."""
    connections = connect(valkey.url, timeout=5)
    client: Any = connections.commands
    try:
        async with run_real_gateway(valkey) as gateway:
            await run_task(gateway)
            before = await client.dump(KEYS.registry)
            await gateway.call_admin("DELETE", "/tenants/shop")
            yield gateway, client, before
    finally:
        await connections.aclose()


async def read_spending_tenants(gateway: RunningGateway) -> list[tuple[str, int]]:
    return [(item["tenant"], item["charged"]["tasks"]) for item in (await read_all_usage(gateway))["items"]]


@pytest.mark.parametrize("anew", [False, True])
async def test_restored_store_keeps_the_deletion(valkey: Valkey, *, anew: bool) -> None:
    async with gateway_with_deleted_tenant(valkey) as (gateway, client, before):
        if anew:
            await gateway.put_tenant()
            gateway.token = await gateway.new_token()
            await run_task(gateway)
        expected = [("shop", 1), ("shop", 1)] if anew else [("shop", 1)]
        assert await read_spending_tenants(gateway) == expected
        registry = gateway.services.registry.current
        await client.restore(KEYS.registry, 0, before, replace=True)
        assert await read_spending_tenants(gateway) == expected
        assert gateway.services.registry.current.deleted_tenant_names == registry.deleted_tenant_names
        assert gateway.services.registry.current.tenants == registry.tenants


async def test_rewritten_registry_includes_deleted_tenants(valkey: Valkey) -> None:
    async with gateway_with_deleted_tenant(valkey) as (gateway, client, _):
        registry = gateway.services.registry.current
        await client.delete(KEYS.registry)
        assert await read_spending_tenants(gateway) == [("shop", 1)]
        stored = await RedisRegistry(RedisScripts(client), KEYS).load()
        assert (
            stored.deleted_tenant_names
            == registry.deleted_tenant_names
            == {next(iter(registry.deleted_tenant_names)): "shop"}
        )


async def test_tenant_created_after_a_loss_keeps_its_name(valkey: Valkey) -> None:
    async with gateway_with_deleted_tenant(valkey) as (gateway, client, before):
        await gateway.put_tenant("shop")
        registry = gateway.services.registry.current
        await client.restore(KEYS.registry, 0, before, replace=True)
        store = RedisRegistry(RedisScripts(client), KEYS)
        old = await store.load()
        (shop,) = old.tenants.values()
        others = {"shop": registry.next_id + 1, "late": registry.next_id + 2}
        made = tuple(type(shop)(id=number, name=name, accounts=("main",)) for name, number in others.items())
        assert await store.write(RegistryChange(version=old.version, next_id=registry.next_id + 3, tenants=made))
        await gateway.services.registry.refresh()
        now = gateway.services.registry.current
        assert now.tenants == registry.tenants
        assert now.deleted_tenant_names == {
            **registry.deleted_tenant_names,
            others["shop"]: "shop",
            others["late"]: "late",
        }
