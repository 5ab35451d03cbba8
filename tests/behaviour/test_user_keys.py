"""The key of an account is sent to the address for which it was given, and to no other."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from httpx2 import Response
from msgspec.structs import replace
from redis import Redis
from structlog.testing import capture_logs

from service.app import create_app, create_ops_app
from service.container import open_container
from service.crypto import Keyring
from service.domain.tenants import Account
from service.settings import Settings
from service.storage.redis import DATA_VERSION, UPGRADABLE_VERSION, Keys
from service.usecases.caches import no_change
from tests.behaviour.gateway_fixture import ENVIRONMENT, SECRET_KEY, USER_KEY, RunningGateway
from tests.behaviour.requests import expect_invalid, expect_json, expect_problem
from tests.contract.scripted_server import ACCEPTED_RESPONSE, ScriptedServer, reply_with, run_server
from tests.support.network import serve_app
from tests.support.valkey import Valkey

KEYS = Keys("gw")
OTHER_ORIGINS: list[Callable[[str], str]] = [
    lambda url: url.replace("http:", "https:"),
    lambda url: url.replace("127.0.0.1", "localhost"),
    lambda url: url.replace("127.0.0.1", "2130706433"),
    lambda url: url.rpartition(":")[0],
]


@pytest.fixture
async def other() -> AsyncIterator[ScriptedServer]:
    """Run another server, which would accept any submission."""
    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer:
        yield peer


@asynccontextmanager
async def run_with_default(gateway: RunningGateway, valkey: Valkey, upstream_url: str) -> AsyncIterator[RunningGateway]:
    """Run a second process on the store of the first, with another default upstream."""
    environment = {"GATEWAY_REDIS_URL": valkey.url, "GATEWAY_UPSTREAM_URL": upstream_url}
    async with AsyncExitStack() as stack:
        services = await stack.enter_async_context(open_container(Settings.load(ENVIRONMENT | environment)))
        await services.registry.refresh()
        urls = [await stack.enter_async_context(serve_app(create(services))) for create in (create_app, create_ops_app)]
        yield dataclasses.replace(gateway, url=urls[0], ops_url=urls[1], services=services)


def upstream_url_of(gateway: RunningGateway) -> str:
    return gateway.services.registry_admin.user_key_cipher.origin(Account(0, "", b""))


async def write_accounts(gateway: RunningGateway, *accounts: Account) -> None:
    """Change accounts in the store, as a program with access to it can."""
    registry = gateway.services.registry
    assert await registry.store.write(replace(no_change(registry.current), accounts=accounts))
    await registry.refresh()


async def expect_no_submission(gateway: RunningGateway, *peers: ScriptedServer) -> None:
    expect_problem(await gateway.submit(), 503, "account-misconfigured")
    assert [peer.connections for peer in peers] == [0] * len(peers)


async def change_account(gateway: RunningGateway, method: str, base_url: str | None, user_key: str = "") -> Response:
    if method == "apply":
        entry: dict[str, Any] = {"base_url": base_url} | ({"user_key": {"value": user_key}} if user_key else {})
        return await gateway.call_admin("PUT", "/registry", json={"accounts": {"main": entry}})
    body = {"base_url": base_url} | ({"user_key": user_key} if user_key else {})
    return await gateway.call_admin(method, "/accounts/main", json=body)


@pytest.mark.parametrize(("method", "field"), [("PUT", ""), ("PATCH", ""), ("apply", "accounts.main.")])
async def test_another_origin_needs_the_key_again(
    gateway: RunningGateway, other: ScriptedServer, method: str, field: str
) -> None:
    url = upstream_url_of(gateway)
    before = gateway.services.registry.current
    for base_url in (other.url, *(change(url) for change in OTHER_ORIGINS)):
        expect_invalid(await change_account(gateway, method, base_url), f"{field}user_key")
    assert gateway.services.registry.current is before
    for same in (url, f"{url.upper().replace('HTTP', 'Http')}/", None):
        assert (await change_account(gateway, method, same)).status_code == 200
    assert (await gateway.submit()).status_code == 201
    assert (await change_account(gateway, method, f"{url}/another/path")).status_code == 200
    assert other.connections == 0
    for user_key in (USER_KEY, "another"):
        assert (await change_account(gateway, method, other.url, user_key)).status_code == 200
        expect_invalid(await change_account(gateway, method, None), f"{field}user_key")
        assert (await gateway.submit()).status_code == 201
        assert user_key.encode() in b"".join(other.requests[-1])


async def test_the_reference_of_a_key_survives_its_move(gateway: RunningGateway, other: ScriptedServer) -> None:
    entry = {"user_key": {"env": "MAIN_KEY", "value": USER_KEY}}
    expect_json(await gateway.call_admin("PUT", "/registry", json={"accounts": {"main": entry}}))
    for user_key, expected in ((USER_KEY, {"env": "MAIN_KEY"}), ("another", None)):
        expect_json(await change_account(gateway, "PATCH", other.url, user_key))
        exported = expect_json(await gateway.call_admin("GET", "/registry"))["accounts"]["main"]
        assert exported.get("user_key") == expected


async def test_keys_in_the_store_can_not_be_redirected(gateway: RunningGateway, other: ScriptedServer) -> None:
    """Neither another base URL in the store nor the place of another account sends a key elsewhere."""
    bait = {"user_key": "bait", "base_url": other.url}
    expect_json(await gateway.call_admin("PUT", "/accounts/bait", json=bait))
    accounts = gateway.services.registry.current.accounts
    main = accounts["main"]
    await write_accounts(gateway, replace(main, base_url=other.url))
    await expect_no_submission(gateway, other)
    await gateway.put_tenant(accounts=["bait"])
    for base_url in (other.url, None):
        await write_accounts(gateway, main, replace(accounts["bait"], user_key=main.user_key, base_url=base_url))
        await expect_no_submission(gateway, other)
    assert await gateway.upstream.count_submits() == 0


async def test_another_default_upstream(gateway: RunningGateway, valkey: Valkey, other: ScriptedServer) -> None:
    """An account of the former default sends nothing until its key is given again, but can be changed otherwise."""
    async with run_with_default(gateway, valkey, other.url) as moved:
        with capture_logs() as logs:
            await expect_no_submission(moved, other)
        assert [log["account"] for log in logs if log["event"] == "account.decryption_failed"] == ["main"]
        result = expect_json(await moved.call_admin("POST", "/registry/rotate-keys"))
        assert result["undecryptable"] == ["accounts.main.user_key"]
        expect_json(await moved.call_admin("PATCH", "/accounts/main", json={"note": "at the former upstream"}))
        expect_json(await moved.call_admin("PATCH", "/accounts/main", json={"base_url": upstream_url_of(gateway)}))
        assert (await moved.submit()).status_code == 201
        assert other.connections == 0
        expect_json(await change_account(moved, "PATCH", None, USER_KEY))
        assert (await moved.submit()).status_code == 201
        assert other.connections == 1


async def test_keys_of_the_former_data_version(gateway: RunningGateway, valkey: Valkey, other: ScriptedServer) -> None:
    """The first process binds them to their addresses; afterwards a key that is not bound is not used."""
    main = gateway.services.registry.current.accounts["main"]
    unbound = replace(main, user_key=Keyring([SECRET_KEY]).derive("user-key").encrypt(USER_KEY.encode()))
    await write_accounts(gateway, unbound)
    await expect_no_submission(gateway)
    with Redis(unix_socket_path=str(valkey.socket_path)) as client, capture_logs() as logs:
        client.set(KEYS.data_version, UPGRADABLE_VERSION)
        for _ in range(2):
            async with run_with_default(gateway, valkey, upstream_url_of(gateway)) as upgraded:
                assert upgraded.services.registry.current.accounts["main"] == main
                assert (await upgraded.submit()).status_code == 201
        assert client.get(KEYS.data_version) == str(DATA_VERSION).encode()
    assert [log["accounts"] for log in logs if log["event"] == "registry.upgraded"] == [["main"]]
    await gateway.services.registry.refresh()
    await write_accounts(gateway, replace(unbound, base_url=other.url))
    expect_problem(await gateway.submit(), 503, "account-misconfigured")
    assert other.connections == 0
