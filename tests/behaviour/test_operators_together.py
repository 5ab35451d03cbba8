"""Several processes change one registry, on a Redis that comes and goes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog

from service.container import assembled
from service.domain.errors import NotFound
from service.domain.tenants import Tenant
from service.settings import Settings
from service.usecases.admin import Operators
from service.usecases.ports import RegistryChange
from tests.behaviour.aftermath import problem
from tests.behaviour.house import SECRET_KEY, House, house_of_fakes, real_house
from tests.support.valkey import Valkey


@asynccontextmanager
async def two_processes(valkey: Valkey) -> AsyncIterator[tuple[Operators, Operators]]:
    """The operators' work in a house, and in another process on the same Redis."""
    settings = Settings.load(
        {
            "GATEWAY_REDIS_URL": valkey.url,
            "GATEWAY_UPSTREAM_URL": "http://127.0.0.1:9",
            "GATEWAY_SECRET_KEYS": base64.b64encode(SECRET_KEY).decode(),
            "GATEWAY_ADMIN_TOKEN": "of-another-process",
        }
    )
    async with real_house(valkey) as house, assembled(settings) as other:
        yield house.services.operators, other.operators


def tenant(name: str) -> Tenant:
    return Tenant(id=0, name=name, accounts=("main",))


async def test_changes_of_two_processes(valkey: Valkey) -> None:
    """Of changes that two processes make at once none is lost, and no id is given twice."""
    async with two_processes(valkey) as (one, other):
        names = [f"tenant-{number}" for number in range(20)]
        made = await asyncio.gather(
            *((one, other)[number % 2].put_tenant(tenant(name)) for number, name in enumerate(names))
        )
        assert {each.name for each in await one.tenants()} == {"shop", *names}
        assert await other.tenants() == await one.tenants()
        assert len({each.tenant.id for each in made}) == len(names)


async def test_forestalled(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change is made anew from what another process wrote in between, so that both stay and have ids of their own."""
    async with two_processes(valkey) as (one, other):
        write = one._change._store.write

        async def forestalled(change: RegistryChange) -> bool:
            monkeypatch.undo()
            await other.put_tenant(tenant("theirs"))
            return await write(change)

        monkeypatch.setattr(one._change._store, "write", forestalled)
        await one.put_tenant(tenant("ours"))
        found = await one.tenants()
        assert {each.name for each in found} == {"shop", "theirs", "ours"}
        assert len({each.id for each in found}) == 3


async def test_change_of_another_process(valkey: Valkey) -> None:
    """What one process changed, an operator sees in another at once."""
    async with two_processes(valkey) as (one, other):
        assert [each.name for each in await other.tenants()] == ["shop"]
        await one.put_tenant(tenant("new"))
        assert (await other.tenant("new")).name == "new"
        await other.delete_tenant("new", force=False)
        with pytest.raises(NotFound):
            await one.tenant("new")


async def test_deleted_is_not_what_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant that was deleted and made anew while its deletion was considered stays."""
    async with house_of_fakes() as (house, ledger, _):
        counters = ledger.counters

        async def meanwhile(found: int) -> Any:
            monkeypatch.undo()
            await house.admin("DELETE", "/tenants/shop")
            await house.put_tenant()
            return await counters(found)

        monkeypatch.setattr(ledger, "counters", meanwhile)
        problem(await house.admin("DELETE", "/tenants/shop"), 409, "conflict")
        assert (await house.admin("GET", "/tenants/shop")).status_code == 200


async def every_call(house: House) -> AsyncIterator[tuple[str, str, Any]]:
    """Each of the operators' calls, in a form that would succeed."""
    (token,) = (await house.admin("GET", "/tenants/shop")).json()["tokens"]
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


async def test_redis_away() -> None:
    """While Redis is away every call is 503 and says when to try again, and nothing is changed or logged as changed."""
    async with house_of_fakes() as (house, ledger, _):
        calls = [call async for call in every_call(house)]
        before = house.services.registry.current
        ledger.away = True
        with structlog.testing.capture_logs() as events:
            for method, path, body in calls:
                answer = await house.admin(method, path, json=body)
                problem(answer, 503, "ledger-unavailable")
                assert int(answer.headers["retry-after"]) > 0
        assert {each["event"] for each in events} == {"request.ended"}
        ledger.away = False
        assert house.services.registry.current is before


async def test_redis_leaves_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that was made just before Redis went away is shown and logged, since nobody could find it out later."""
    async with house_of_fakes() as (house, ledger, _):
        registry: Any = house.services.registry
        write = registry.write

        async def last_words(change: Any) -> bool:
            written: bool = await write(change)
            ledger.away = True
            return written

        monkeypatch.setattr(registry, "write", last_words)
        with structlog.testing.capture_logs() as events:
            answer = await house.admin("POST", "/tenants/shop/tokens")
        assert answer.status_code == 201
        assert [each["id"] for each in events if each["event"] == "token.created"] == [answer.json()["id"]]
        ledger.away = False
        assert (await house.call("GET", "/v1/quota", token=answer.json()["token"])).status_code == 200


async def test_too_much_contention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that others always forestall is given up as overload, and not made."""
    async with house_of_fakes() as (house, _, _):

        async def stale(_: Any) -> bool:
            return False

        monkeypatch.setattr(house.services.registry, "write", stale)
        answer = await house.admin("PUT", "/tenants/new", json={"accounts": ["main"]})
        problem(answer, 503, "overloaded")
        problem(await house.admin("GET", "/tenants/new"), 404, "not-found")
