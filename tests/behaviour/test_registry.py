"""The registry as one document, and what deletions of accounts and tenants leave behind."""

from __future__ import annotations

import asyncio
from typing import Any

from httpx2 import Response
from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.behaviour.clients import wait_until
from tests.behaviour.gateway_fixture import USER_KEY, RunningGateway
from tests.behaviour.requests import (
    UNREACHABLE_LIMITS,
    expect_invalid,
    expect_json,
    expect_problem,
    read_counts,
    run_task,
)
from tests.behaviour.webhook_receiver import make_secret
from tests.support.valkey import Valkey

ACCOUNT_KEY = "a-key-of-the-registry-0123"
ACCOUNT = {"base_url": "http://127.0.0.1:9", "floor_count": 2, "floor_money": 0.5, "max_price": {"upscale": 1.25}}
TENANT = {
    "accounts": ["spare", "main"],
    "limits": [{"window": "day", "tasks": 5, "money": None}],
    "max_active": 4,
    "spending_mode": "count_only",
    "kinds": ["upscale"],
    "state": "read-only",
    "webhook": {"url": "https://hooks.example/a", "allow": ["10.0.0.0/8"]},
    "allow_image_url": ["images.example", "10.0.0.0/8:8080"],
}
TOKEN = {"sha256": "ab" * 32, "label": "a label", "expires_at": "2100-01-01T00:00:00Z"}
FULL_REGISTRY: dict[str, Any] = {
    "accounts": {
        "main": ACCOUNT | {"user_key": {"env": "MAIN_KEY", "value": ACCOUNT_KEY}},
        "spare": {"user_key": {"file": "spare.key", "value": ACCOUNT_KEY + "-2"}},
    },
    "tenants": {"shop": TENANT | {"tokens": {"0123456789ab": TOKEN}}},
}
FULL_REGISTRY["tenants"]["shop"]["webhook"] |= {"secret": {"env": "HOOK", "value": make_secret()}}
LOST_AFTER_SECONDS = 1_800
"""Seconds after which a task that cannot be checked is given up."""


async def get_registry(gateway: RunningGateway) -> dict[str, Any]:
    response = await gateway.call_admin("GET", "/registry")
    assert response.headers["etag"] == f'"{gateway.services.registry.current.version}"'
    return expect_json(response)


async def put_registry(gateway: RunningGateway, document: Any, query: str = "", **headers: str) -> Response:
    return await gateway.call_admin("PUT", f"/registry{query}", json=document, headers=headers)


async def apply_registry(gateway: RunningGateway, document: Any, query: str = "") -> dict[str, Any]:
    """Send the registry; return the differences applied."""
    return expect_json(await put_registry(gateway, document, query))


async def read_account(gateway: RunningGateway) -> dict[str, Any]:
    return expect_json(await gateway.call_admin("GET", "/accounts/main"))


async def delete_by_force(gateway: RunningGateway, path: str) -> None:
    response = await gateway.call_admin("DELETE", f"{path}?force=true")
    assert (response.status_code, response.content) == (204, b"")


async def test_document_is_applied_in_one_version_and_once(gateway: RunningGateway) -> None:
    before = gateway.services.registry.current
    assert (await apply_registry(gateway, FULL_REGISTRY))["applied"]
    after = gateway.services.registry.current
    assert after.version == before.version + 1
    assert after.accounts["main"].id == before.accounts["main"].id
    document = await get_registry(gateway)
    for token in before.tokens:  # stays without `prune`
        assert document["tenants"]["shop"]["tokens"].pop(token)["sha256"]
    for section in ("accounts", "tenants"):
        for name, sent in FULL_REGISTRY[section].items():
            applied = {key: item for key, item in document[section][name].items() if key in sent}
            assert _without_secrets(applied) == _without_secrets(sent)
    expect_problem(await gateway.submit(), 403, "tenant-read-only")
    for again, query in ((FULL_REGISTRY, ""), (await get_registry(gateway), "?prune=true")):
        applied = await apply_registry(gateway, again, query)
        assert (applied["applied"], applied["differences"], applied["generated_secrets"]) == (False, [], {})
    assert gateway.services.registry.current.version == after.version


def _without_secrets(value: Any) -> Any:
    """Remove secrets, and creation times that the request omitted."""
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items() if key not in {"value", "created_at"}}
    return value


async def test_dry_run_and_prune(gateway: RunningGateway) -> None:
    await apply_registry(gateway, FULL_REGISTRY)
    version = gateway.services.registry.current.version
    document = await get_registry(gateway)
    document["accounts"]["main"]["user_key"]["value"] = "quite-another-key"
    spare = document["accounts"].pop("spare")
    document["tenants"]["shop"]["accounts"] = ["main"]
    hook = {"url": "https://hooks.example/b?key=secret"}
    document["tenants"]["press"] = {"accounts": ["main"], "webhook": hook}
    (token,) = {*document["tenants"]["shop"]["tokens"]} - {"0123456789ab"}
    removed = document["tenants"]["shop"]["tokens"].pop(token)
    dry_run = await apply_registry(gateway, document, "?dry_run=true&prune=true")
    shown = {"accounts": ["main"], "webhook": {"url": "https://hooks.example/b?…"}}
    assert [list(difference.values()) for difference in dry_run["differences"]] == [
        ["accounts.main.user_key.value", "changed"],
        ["accounts.spare", "removed", spare],
        ["tenants.press", "added", shown],
        ["tenants.press.webhook.secret.value", "added"],
        ["tenants.shop.accounts", "changed", ["spare", "main"], ["main"]],
        [f"tenants.shop.tokens.{token}", "removed", removed],
    ]
    assert (dry_run["applied"], dry_run["generated_secrets"]) == (False, {})
    assert gateway.services.registry.current.version == version
    applied = await apply_registry(gateway, document)
    assert applied["unmanaged"] == ["accounts.spare", f"tenants.shop.tokens.{token}"]
    assert applied["generated_secrets"]["press"].startswith("whsec_")
    pruned = await apply_registry(gateway, document, "?prune=true")
    assert (pruned["unmanaged"], pruned["generated_secrets"]) == ([], {})
    expect_problem(await gateway.call("GET", "/v1/quota"), 401, "unauthenticated")
    assert list(gateway.services.registry.current.accounts) == ["main"]
    hook["url"] = "https://hooks.example/b?key=other"
    (difference,) = (await apply_registry(gateway, document))["differences"]
    hidden = "https://hooks.example/b?…"
    assert [*difference.values()] == ["tenants.press.webhook.url", "changed", hidden, hidden]
    assert gateway.services.registry.current.tenants["press"].webhook.url == hook["url"]


async def test_changed_key_reopens_the_account(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(count=1, money=0)
    await run_task(gateway)
    for key, state in ((USER_KEY, "exhausted"), (ACCOUNT_KEY, "open")):
        account = {"user_key": {"value": key}, "max_price": {"upscale": 1}}
        await apply_registry(gateway, {"accounts": {"main": account}})
        assert (await read_account(gateway))["state"] == state


async def test_pruning_all_or_running_work_needs_force(gateway: RunningGateway) -> None:
    before = gateway.services.registry.current
    for query in ("?prune=true", "?prune=true&dry_run=true"):
        expect_problem(await put_registry(gateway, {"accounts": {}}, query), 409, "conflict")
    await gateway.upstream.keep_running()
    await gateway.submit()
    remaining: list[dict[str, Any]] = [{"accounts": {"main": {}}}, {"tenants": {"shop": {"accounts": []}}}]
    for document in remaining:
        expect_problem(await put_registry(gateway, document, "?prune=true"), 409, "conflict")
    assert gateway.services.registry.current is before
    await apply_registry(gateway, {}, "?prune=true&force=true")
    after = gateway.services.registry.current
    assert (after.accounts, after.tenants, after.tokens) == ({}, {}, {})
    assert (await apply_registry(gateway, {}, "?prune=true"))["differences"] == []


async def test_only_the_current_version_is_replaced(gateway: RunningGateway) -> None:
    before = gateway.services.registry.current
    for tag in (f'W/"{before.version}"', str(before.version), '"1", "2"'):
        expect_problem(await put_registry(gateway, FULL_REGISTRY, **{"If-Match": tag}), 412, "outdated")
    assert gateway.services.registry.current is before
    response = await put_registry(gateway, FULL_REGISTRY, **{"If-Match": f'"0", "{before.version}"'})
    assert (response.status_code, response.headers["etag"]) == (200, f'"{before.version + 1}"')
    assert (await put_registry(gateway, FULL_REGISTRY, **{"If-Match": "*"})).status_code == 200


async def test_one_error_rejects_the_document(gateway: RunningGateway) -> None:
    before = gateway.services.registry.current
    fine = {"accounts": ["main"]}
    for accounts, tenants, fields in (
        (
            {"main": {"floor_money": 0.001, "user_key": {"value": "with blanks"}}},
            {"shop": fine | {"limits": [{"window": "day"}]}, "fine": fine},
            ["accounts.main.user_key", "accounts.main.floor_money", "tenants.shop.limits[0]"],
        ),
        ({"new": {}}, {"shop": {"accounts": ["mian"]}}, ["accounts.new.user_key", "tenants.shop.accounts[0]"]),
    ):
        response = await put_registry(gateway, {"accounts": accounts, "tenants": tenants})
        expect_invalid(response, *fields)
        assert "with blanks" not in response.text
    expect_invalid(await put_registry(gateway, {}, "?prune=maybe"), "prune")
    assert gateway.services.registry.current is before


async def test_secret_reference_survives_while_the_secret_does(gateway: RunningGateway) -> None:
    await apply_registry(gateway, FULL_REGISTRY)
    await gateway.call_admin("PUT", "/accounts/main", json={"floor_count": 1})
    await gateway.put_tenant(webhook={"url": "https://hooks.example/a"})
    document = await get_registry(gateway)
    assert document["accounts"]["main"]["user_key"] == {"env": "MAIN_KEY"}
    assert document["tenants"]["shop"]["webhook"]["secret"] == {"env": "HOOK"}
    await gateway.call_admin("PUT", "/accounts/main", json={"user_key": "of-a-command"})
    await gateway.call_admin("POST", "/tenants/shop/webhook-secret")
    document = await get_registry(gateway)
    assert "user_key" not in document["accounts"]["main"]
    assert "secret" not in document["tenants"]["shop"]["webhook"]


async def test_recreated_account_inherits_nothing(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    old = (await gateway.submit()).json()
    await delete_by_force(gateway, "/accounts/main")
    await gateway.call_admin("PUT", "/accounts/main", json={"user_key": USER_KEY})
    fresh = await read_account(gateway)
    assert (fresh["state"], fresh["remaining_count"], fresh["in_flight"]) == ("open", None, 0)
    expect_problem(await gateway.submit(), 503, "account-misconfigured")
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    new = (await gateway.submit()).json()
    await gateway.poll_due_tasks()
    assert (await gateway.wait_for_task(new["id"]))["state"] == "succeeded"
    assert expect_json(await gateway.call("GET", old["links"]["self"]))["state"] == "queued"
    assert (await read_account(gateway))["in_flight"] == 0
    assert await read_counts(gateway) == (2, 0, 1)
    await gateway.advance(LOST_AFTER_SECONDS)
    assert (await gateway.wait_for_task(old["id"]))["error"]["code"] == "task-lost"
    assert await read_counts(gateway) == (2, 0, 0)


async def test_tenant_deleted_with_running_tasks(gateway: RunningGateway, valkey: Valkey) -> None:
    tasks = [(await gateway.submit()).json() for _ in range(3)]
    await delete_by_force(gateway, "/tenants/shop")
    assert gateway.services.registry.current.tokens == {}
    expect_problem(await gateway.call("GET", tasks[0]["links"]["self"]), 401, "unauthenticated")
    expect_problem(await gateway.submit(), 401, "unauthenticated")
    assert (await read_account(gateway))["in_flight"] == 3
    with capture_logs() as events:
        await gateway.poll_due_tasks()
    assert [event["state"] for event in events if event["event"] == "task.finished"] == ["succeeded"] * 3
    assert {event["log_level"] for event in events} <= {"info", "debug"}
    assert (await read_account(gateway))["in_flight"] == 0
    account = gateway.services.registry.current.accounts["main"].id
    async with Redis(unix_socket_path=str(valkey.socket_path), decode_responses=True) as store:
        kept = {key.removeprefix("{gw}:") async for key in store.scan_iter() if await store.pttl(key) < 0}
    assert kept == {"version", "clock", "clock:server", "registry", f"account:{account}"}
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    expect_problem(await gateway.call("GET", "/v1/quota"), 401, "unauthenticated")
    gateway.token = await gateway.new_token()
    expect_problem(await gateway.call("GET", tasks[0]["links"]["self"]), 404, "not-found")
    assert (await gateway.call("GET", "/v1/tasks")).json()["items"] == []
    assert await read_counts(gateway) == (0, 0, 0)
    assert (await gateway.submit()).status_code == 201


async def test_operators_read_tasks_of_a_deleted_tenant_and_account(gateway: RunningGateway) -> None:
    task = await run_task(gateway)
    for path in ("/tenants/shop", "/accounts/main"):
        assert (await gateway.call_admin("DELETE", path)).status_code == 204
    read = expect_json(await gateway.call_admin("GET", f"/tasks/{task['id']}"))
    assert (read["tenant"], read["account"], read["artifacts"]) == ("shop", None, task["artifacts"])
    assert expect_json(await gateway.call_admin("GET", "/tasks?tenant=shop"))["items"] == [read]
    await gateway.create_demo_tenant()
    assert expect_json(await gateway.call_admin("GET", "/tasks?tenant=shop"))["items"] == []


async def test_deleted_while_sending(gateway: RunningGateway) -> None:
    with gateway.hold_responses() as held:
        submitting = asyncio.create_task(gateway.submit())
        await wait_until(lambda: held.count == 1)
        for path in ("/tenants/shop", "/accounts/main"):
            await delete_by_force(gateway, path)
    assert (await submitting).status_code == 201
    with capture_logs() as events:
        for _ in range(2):
            await gateway.advance(LOST_AFTER_SECONDS)
            await gateway.poll_due_tasks()
    assert [event["state"] for event in events if event["event"] == "task.finished"] == ["failed"]
    assert {event["log_level"] for event in events} <= {"info", "debug"}
    assert await gateway.upstream.count_submits() == 1
