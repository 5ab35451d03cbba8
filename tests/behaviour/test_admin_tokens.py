"""Tokens: creation, expiry and revocation."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway, run_fake_gateway
from tests.fakes import START

NOW = datetime.fromtimestamp(START / 1000, UTC)
"""The time of the fakes, whose clock stands still."""


async def make_token(gateway: RunningGateway, **body: Any) -> dict[str, Any]:
    response = await gateway.call_admin("POST", "/tenants/shop/tokens", json=body)
    assert response.status_code == 201, response.text
    assert response.headers["cache-control"] == "no-store"
    made: dict[str, Any] = response.json()
    return made


async def is_token_valid(gateway: RunningGateway, token: str) -> bool:
    """Check a token; if it is invalid, assert the same 401 as for an unknown one."""
    response = await gateway.call("GET", "/v1/quota", token=token)
    if response.status_code != 200:
        expect_problem(response, 401, "unauthenticated")
    return response.status_code == 200


async def list_tokens(gateway: RunningGateway) -> list[dict[str, Any]]:
    response = await gateway.call_admin("GET", "/tenants/shop")
    tokens: list[dict[str, Any]] = response.json()["tokens"]
    return tokens


async def test_token_is_shown_once(gateway: RunningGateway) -> None:
    made = await make_token(gateway, label="生产", expires_at="2999-12-31T23:30:00+08:00")
    assert made.keys() == {"id", "token", "expires_at"}
    assert made["expires_at"] == "2999-12-31T15:30:00Z"
    assert await is_token_valid(gateway, made["token"])
    listed = {token["id"]: token for token in await list_tokens(gateway)}[made["id"]]
    assert listed.keys() == {"id", "label", "created_at", "expires_at"}
    assert (listed["label"], listed["expires_at"]) == ("生产", made["expires_at"])


async def test_token_without_a_body(gateway: RunningGateway) -> None:
    response = await gateway.call_admin("POST", "/tenants/shop/tokens")
    assert (response.status_code, response.json()["expires_at"]) == (201, None)
    assert await is_token_valid(gateway, response.json()["token"])


async def test_revoked_token_is_refused_at_once(gateway: RunningGateway) -> None:
    made, other = await make_token(gateway), await make_token(gateway)
    path = f"/tenants/shop/tokens/{made['id']}"
    response = await gateway.call_admin("DELETE", path)
    assert (response.status_code, response.content) == (204, b"")
    assert not await is_token_valid(gateway, made["token"])
    assert await is_token_valid(gateway, other["token"])
    expect_problem(await gateway.call_admin("DELETE", path), 404, "not-found")


async def test_token_of_another_tenant_is_not_revoked(gateway: RunningGateway) -> None:
    made = await make_token(gateway)
    await gateway.put_tenant("other")
    expect_problem(await gateway.call_admin("DELETE", f"/tenants/other/tokens/{made['id']}"), 404, "not-found")
    assert await is_token_valid(gateway, made["token"])


async def test_revoked_with_grace(gateway: RunningGateway) -> None:
    made = await make_token(gateway)
    response = await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{made['id']}?grace=3600")
    assert response.status_code == 204
    assert await is_token_valid(gateway, made["token"])
    listed = {token["id"]: token for token in await list_tokens(gateway)}[made["id"]]
    lifetime = datetime.fromisoformat(listed["expires_at"]) - datetime.fromisoformat(listed["created_at"])
    assert timedelta(minutes=60) <= lifetime < timedelta(minutes=61)


async def test_grace_runs_out() -> None:
    async with run_fake_gateway() as (gateway, ledger, _):
        made = await make_token(gateway)
        await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{made['id']}?grace=60")
        ledger.clock.now_ms += 59_999
        assert await is_token_valid(gateway, made["token"])
        ledger.clock.now_ms += 1
        assert not await is_token_valid(gateway, made["token"])
        assert made["id"] not in {token["id"] for token in await list_tokens(gateway)}


async def test_grace_never_extends_a_token() -> None:
    async with run_fake_gateway() as (gateway, ledger, _):
        expiring = await make_token(gateway, expires_at=(NOW + timedelta(seconds=30)).isoformat())
        revoked = await make_token(gateway)
        await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{revoked['id']}?grace=30")
        for item in (expiring, revoked):
            await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{item['id']}?grace=3600")
        ledger.clock.now_ms += 30_000
        assert not await is_token_valid(gateway, expiring["token"])
        assert not await is_token_valid(gateway, revoked["token"])


async def test_token_expires() -> None:
    async with run_fake_gateway() as (gateway, ledger, _):
        made = await make_token(gateway, expires_at=(NOW + timedelta(days=90)).isoformat())
        ledger.clock.now_ms += 90 * 86_400_000 - 1
        assert await is_token_valid(gateway, made["token"])
        ledger.clock.now_ms += 1
        assert not await is_token_valid(gateway, made["token"])


async def test_expired_tokens_are_pruned() -> None:
    async with run_fake_gateway() as (gateway, ledger, _):
        made = await make_token(gateway, expires_at=(NOW + timedelta(days=1)).isoformat())
        ledger.clock.now_ms += 86_400_000
        assert made["id"] in gateway.services.registry.current.tokens
        await make_token(gateway)
        assert made["id"] not in gateway.services.registry.current.tokens
        assert await is_token_valid(gateway, gateway.token)
