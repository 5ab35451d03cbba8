"""Secrets in responses, logs and Redis."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
import structlog
from httpx2 import Response

from service.storage.connections import connect
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway, run_real_gateway
from tests.behaviour.upstream_control import USER_KEY
from tests.support.valkey import Valkey

KEYS = [USER_KEY, "upstream-key-of-before-0123"]


async def call_every_operation(gateway: RunningGateway) -> AsyncIterator[Response]:
    """Call all routes, with errors too; return the responses except those that show a new token."""
    for key in (*KEYS, KEYS[0]):
        yield await gateway.call_admin("PUT", "/accounts/main", json={"user_key": key})
        yield await gateway.call_admin("PUT", "/accounts/main", json={"user_key": key, "nonsense": key})
    yield await gateway.call_admin("PUT", "/accounts/main", json={"user_key": KEYS[0], "floor_count": "x"})
    yield await gateway.call_admin("PUT", "/accounts/main", content=b'{"user_key": "' + KEYS[0].encode())
    yield await gateway.call_admin("PUT", "/accounts/main", json={"user_key": [KEYS[0]]})
    for path in ("/accounts", "/accounts/main", "/tenants", "/tenants/shop"):
        yield await gateway.call_admin("GET", path)
    yield await gateway.call_admin("POST", "/accounts/main/reopen")
    submitted = await gateway.submit("upscale", {"prompt": "a prompt"})
    yield submitted
    await gateway.wait_for_task(submitted.json()["id"])
    for path in ("/v1/tasks", f"/v1/tasks/{submitted.json()['id']}", "/v1/quota", "/v1/nowhere", "/openapi.json"):
        yield await gateway.call("GET", path)
    yield await gateway.call("GET", "/v1/quota", token=gateway.token[:-1])
    yield await gateway.http.get(f"{gateway.ops_url}/metrics")
    yield await gateway.call_admin("GET", "/nowhere")
    yield await gateway.call_admin("DELETE", "/tenants/shop?force=true")
    yield await gateway.call("GET", "/v1/quota")
    yield await gateway.call_admin("DELETE", "/accounts/main")


def encode_secret(secret: str) -> set[bytes]:
    """Return encodings of a secret."""
    plain = secret.encode()
    return {plain, base64.b64encode(plain).rstrip(b"="), plain.hex().encode(), plain[:-1]}


async def test_no_response_or_log_contains_a_secret(gateway: RunningGateway) -> None:
    with structlog.testing.capture_logs() as events:
        responses = [item async for item in call_every_operation(gateway)]
    texts = [repr((dict(response.headers), response.content)).encode() for response in responses]
    assert {response.status_code for response in responses} >= {200, 201, 204, 400, 401, 404, 422}
    assert {"account.updated", "tenant.deleted", "account.deleted", "account.reopened"} <= {
        event["event"] for event in events
    }
    for secret in (*KEYS, gateway.token, ADMIN_TOKEN):
        for spelling in encode_secret(secret):
            assert [text for text in texts if spelling in text] == []
            assert [event for event in events if spelling in repr(event).encode()] == []


async def test_changes_are_logged(gateway: RunningGateway) -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logged:
        await gateway.call_admin("PUT", "/accounts/main", json={"floor_count": 2})
        await gateway.put_tenant(max_active=4)
        made = (await gateway.call_admin("POST", "/tenants/shop/tokens", json={"label": "a label"})).json()
        await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{made['id']}?grace=60")
        await gateway.call_admin("POST", "/accounts/main/reopen")
        await gateway.call_admin("DELETE", "/accounts/main")
        await gateway.call_admin("DELETE", "/tenants/shop")
        await gateway.call_admin("DELETE", "/accounts/main")
    changes = [item for item in logged if item["event"].partition(".")[0] in {"account", "tenant", "token"}]
    assert [(change["event"], change.get("account") or change.get("tenant")) for change in changes] == [
        ("account.updated", "main"),
        ("tenant.updated", "shop"),
        ("token.created", "shop"),
        ("token.revoked", "shop"),
        ("account.reopened", "main"),
        ("tenant.deleted", "shop"),
        ("account.deleted", "main"),
    ]
    assert changes[0]["floor_count"] == 2
    assert changes[1]["max_active"] == 4
    assert (changes[2]["id"], changes[2]["label"]) == (made["id"], "a label")
    assert (changes[3]["id"], changes[3]["grace"]) == (made["id"], 60)
    assert all(change["request_id"] for change in changes)


@pytest.mark.parametrize("phase", ["running", "finished"])
async def test_redis_holds_no_secret(valkey: Valkey, phase: str) -> None:
    async with run_real_gateway(valkey) as gateway:
        other = await gateway.new_token(label="another")
        await gateway.call_admin("PUT", "/accounts/spare", json={"user_key": KEYS[1]})
        task = (await gateway.submit("upscale", {"prompt": "a prompt"})).json()
        if phase == "finished":
            await gateway.wait_for_task(task["id"])
        dumps = [dump_key async for dump_key in _dump_keys(valkey)]
        assert any(b"spare" in item for item in dumps), "the registry is missing"
        assert any(b"a prompt" in item for item in dumps), "the tasks are missing"
        for secret in (*KEYS, gateway.token, other, ADMIN_TOKEN):
            for spelling in encode_secret(secret):
                assert [item for item in dumps if spelling in item] == []


async def _dump_keys(valkey: Valkey) -> AsyncIterator[bytes]:
    """Return name and content of every key."""
    connections = connect(valkey.url, timeout=5)
    client: Any = connections.commands
    readers: dict[bytes, Any] = {
        b"string": client.get,
        b"hash": client.hgetall,
        b"zset": lambda key: client.zrange(key, 0, -1),
        b"set": client.smembers,
        b"list": lambda key: client.lrange(key, 0, -1),
    }
    try:
        async for key in client.scan_iter():
            yield key
            content = await readers[await client.type(key)](key)
            for item in _flatten(content):
                yield item
    finally:
        await connections.aclose()


def _flatten(content: Any) -> list[bytes]:
    if isinstance(content, dict):
        return [part for pair in content.items() for part in pair]
    return [content] if isinstance(content, bytes) else list(content)
