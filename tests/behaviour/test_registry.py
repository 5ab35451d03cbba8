"""The registry as one document, and what deletions of accounts and tenants leave behind."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from httpx2 import Response
from redis.asyncio import Redis
from structlog.testing import capture_logs

from service.usecases.ports import SubmitResult
from tests.behaviour.gateway_fixture import USER_KEY, RunningGateway
from tests.behaviour.requests import expect_json, expect_problem, run_task
from tests.support.valkey import Valkey

ACCOUNT_KEY = "a-key-of-the-registry-0123"
HOOK_SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
ACCOUNT = {"base_url": "http://127.0.0.1:9", "floor_count": 2, "floor_money": 0.5, "max_price": {"upscale": 1.25}}
TENANT = {
    "accounts": ["spare", "main"],
    "limits": [{"window": "day", "tasks": 5, "money": None}],
    "max_active": 4,
    "spending_mode": "count_only",
    "kinds": ["upscale"],
    "state": "read-only",
    "webhook": {"url": "https://hooks.example/a", "allow": ["10.0.0.0/8"]},
}
TOKEN = {"sha256": "ab" * 32, "label": "a label", "expires_at": "2100-01-01T00:00:00Z"}
FULL_REGISTRY: dict[str, Any] = {
    "accounts": {
        "main": ACCOUNT | {"user_key": {"env": "MAIN_KEY", "value": ACCOUNT_KEY}},
        "spare": {"user_key": {"file": "spare.key", "value": ACCOUNT_KEY + "-2"}},
    },
    "tenants": {"shop": TENANT | {"tokens": {"0123456789ab": TOKEN}}},
}
FULL_REGISTRY["tenants"]["shop"]["webhook"] |= {"secret": {"env": "HOOK", "value": HOOK_SECRET}}
LIMITS: dict[str, Any] = {"limits": [{"window": "total", "tasks": 1_000}], "max_active": 1_000}
"""Limits that no test reaches, so that the quota reports every counter."""
LOST_AFTER_SECONDS = 1_800
"""Seconds after which a task that cannot be checked is given up."""


async def get_registry(gateway: RunningGateway) -> dict[str, Any]:
    return expect_json(await gateway.call_admin("GET", "/registry"))


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


async def read_task(gateway: RunningGateway, task: dict[str, Any]) -> dict[str, Any]:
    return expect_json(await gateway.call("GET", task["links"]["self"]))


async def read_policies(gateway: RunningGateway) -> dict[str, dict[str, Any]]:
    return {policy["policy"]: policy for policy in (await gateway.call("GET", "/v1/quota")).json()["policies"]}


async def read_counts(gateway: RunningGateway) -> tuple[float, float, float]:
    """Return used, reserved and active tasks of `shop`."""
    policies = await read_policies(gateway)
    return policies["total-tasks"]["used"], policies["total-tasks"]["reserved"], policies["max-active"]["used"]


async def test_document_has_no_secrets(gateway: RunningGateway) -> None:
    response = await gateway.call_admin("GET", "/registry")
    document = response.json()
    current = gateway.services.registry.current
    assert response.headers["etag"] == f'"{current.version}"'
    assert response.headers["cache-control"] == "no-store"
    assert document["accounts"] == {"main": {"id": current.accounts["main"].id}}
    (token,) = current.tokens.values()
    assert document["tenants"]["shop"]["id"] == current.tenants["shop"].id
    assert document["tenants"]["shop"]["tokens"][token.id]["sha256"] == token.digest.hex()
    assert USER_KEY not in response.text
    assert gateway.token not in response.text


async def test_document_is_applied_in_one_version_and_once(gateway: RunningGateway) -> None:
    before = gateway.services.registry.current
    assert (await apply_registry(gateway, FULL_REGISTRY))["applied"]
    after = gateway.services.registry.current
    assert after.version == before.version + 1
    assert after.accounts["main"].id == before.accounts["main"].id
    document = await get_registry(gateway)
    for section in ("accounts", "tenants"):
        for name, sent in FULL_REGISTRY[section].items():
            applied = {key: item for key, item in document[section][name].items() if key in sent}
            for token in before.tokens:  # stays without `prune`
                applied.get("tokens", {}).pop(token, None)
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
    assert (await gateway.call("GET", "/v1/quota")).status_code == 200
    pruned = await apply_registry(gateway, document, "?prune=true")
    assert (pruned["unmanaged"], pruned["generated_secrets"]) == ([], {})
    expect_problem(await gateway.call("GET", "/v1/quota"), 401, "unauthenticated")
    assert list(gateway.services.registry.current.accounts) == ["main"]


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
    for tag in ('"1"', f'W/"{before.version}"', str(before.version), '"x"', '"1", "2"'):
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
        ({"main": {"x": 1}}, {"fine": fine}, ["accounts.main.x"]),
    ):
        response = await put_registry(gateway, {"accounts": accounts, "tenants": tenants})
        problem = expect_problem(response, 422, "invalid-options")
        assert [error["field"] for error in problem["errors"]] == fields
        assert "with blanks" not in response.text
    expect_problem(await put_registry(gateway, {}, "?prune=maybe"), 422, "invalid-options")
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


async def test_changed_key_reopens_the_account(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(count=1, money=0)
    await run_task(gateway)
    same_key = {"user_key": {"value": USER_KEY}, "max_price": {"upscale": 1}}
    for account, state in ((same_key, "exhausted"), ({"user_key": {"value": ACCOUNT_KEY}}, "open")):
        await apply_registry(gateway, {"accounts": {"main": account}})
        assert (await read_account(gateway))["state"] == state


async def test_deletion_of_used_objects_needs_force(gateway: RunningGateway) -> None:
    await gateway.upstream.keep_running()
    await gateway.submit()
    await gateway.call_admin("PUT", "/accounts/spare", json={"user_key": "spare"})
    await gateway.put_tenant("other", accounts=["spare"])
    for path in ("/accounts/main", "/tenants/shop", "/accounts/spare"):
        expect_problem(await gateway.call_admin("DELETE", path), 409, "conflict")
    for path in ("/tenants/other", "/accounts/spare", "/tenants/shop?force=true", "/accounts/main?force=true"):
        assert (await gateway.call_admin("DELETE", path)).status_code == 204
        expect_problem(await gateway.call_admin("DELETE", path), 404, "not-found")
        expect_problem(await gateway.call_admin("GET", path.partition("?")[0]), 404, "not-found")


async def test_tasks_of_a_deleted_account_are_lost_in_time(gateway: RunningGateway) -> None:
    await gateway.put_tenant(limits=[{"window": "total", "tasks": 1_000, "money": 1_000}], max_active=1_000)
    tasks = [(await gateway.submit()).json() for _ in range(2)]
    assert (await read_policies(gateway))["total-money"]["reserved"] > 0
    checks = await gateway.upstream.count_checks()
    await delete_by_force(gateway, "/accounts/main")
    await gateway.poll_due_tasks()
    await gateway.advance(LOST_AFTER_SECONDS - 60)
    await gateway.poll_due_tasks()
    assert [(await read_task(gateway, task))["state"] for task in tasks] == ["queued"] * 2
    assert await read_counts(gateway) == (2, 0, 2)
    expect_problem(await gateway.submit(), 503, "account-misconfigured")
    await gateway.advance(60)
    ended = [await gateway.wait_for_task(task["id"]) for task in tasks]
    assert {(task["state"], task["error"]["code"]) for task in ended} == {("failed", "task-lost")}
    assert {task["cost"]["basis"] for task in ended} <= {"estimated", "unknown"}
    assert [await read_task(gateway, task) for task in tasks] == ended
    assert await read_counts(gateway) == (2, 0, 0)
    money = (await read_policies(gateway))["total-money"]
    assert (money["reserved"], money["remaining"]) == (0, 1_000)
    assert await gateway.upstream.count_checks() == checks


async def test_recreated_account_inherits_nothing(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**LIMITS)
    old = (await gateway.submit()).json()
    await delete_by_force(gateway, "/accounts/main")
    await gateway.call_admin("PUT", "/accounts/main", json={"user_key": USER_KEY})
    fresh = await read_account(gateway)
    assert (fresh["state"], fresh["remaining_count"], fresh["in_flight"]) == ("open", None, 0)
    expect_problem(await gateway.submit(), 503, "account-misconfigured")
    await gateway.put_tenant(**LIMITS)
    new = (await gateway.submit()).json()
    await gateway.poll_due_tasks()
    assert (await gateway.wait_for_task(new["id"]))["state"] == "succeeded"
    assert (await read_task(gateway, old))["state"] == "queued"
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
    assert await _permanent_keys(valkey) == {"version", "clock", "clock:server", "registry", f"account:{account}"}
    await gateway.put_tenant(**LIMITS)
    expect_problem(await gateway.call("GET", "/v1/quota"), 401, "unauthenticated")
    gateway.token = await gateway.new_token()
    expect_problem(await gateway.call("GET", tasks[0]["links"]["self"]), 404, "not-found")
    assert (await gateway.call("GET", "/v1/tasks")).json()["items"] == []
    assert await read_counts(gateway) == (0, 0, 0)
    assert (await gateway.submit()).status_code == 201


async def _permanent_keys(valkey: Valkey) -> set[str]:
    async with Redis(unix_socket_path=str(valkey.socket_path)) as store:
        keys = [key async for key in store.scan_iter()]
        return {key.decode().removeprefix("{gw}:") for key in keys if await store.pttl(key) < 0}


async def test_operators_read_tasks_of_a_deleted_tenant_and_account(gateway: RunningGateway) -> None:
    task = await run_task(gateway)
    for path in ("/tenants/shop", "/accounts/main"):
        assert (await gateway.call_admin("DELETE", path)).status_code == 204
    read = expect_json(await gateway.call_admin("GET", f"/tasks/{task['id']}"))
    assert (read["tenant"], read["account"], read["artifacts"]) == ("shop", None, task["artifacts"])
    assert expect_json(await gateway.call_admin("GET", "/tasks?tenant=shop"))["items"] == [read]
    await gateway.create_demo_tenant()
    assert expect_json(await gateway.call_admin("GET", "/tasks?tenant=shop"))["items"] == []
    assert expect_json(await gateway.call_admin("GET", f"/tasks/{task['id']}")) == read


@pytest.mark.parametrize("paths", [["/tenants/shop"], ["/accounts/main"], ["/tenants/shop", "/accounts/main"]])
async def test_deleted_while_sending(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, paths: list[str]
) -> None:
    upstream = gateway.services.submitter.upstream
    submit = upstream.submit

    async def submit_and_delete(*args: Any, **more: Any) -> SubmitResult:
        result = await submit(*args, **more)
        for path in paths:
            await delete_by_force(gateway, path)
        return result

    monkeypatch.setattr(upstream, "submit", submit_and_delete)
    task = (await gateway.submit()).json()
    with capture_logs() as events:
        for _ in range(2):
            await gateway.advance(LOST_AFTER_SECONDS)
            await gateway.poll_due_tasks()
    finished = [event["state"] for event in events if event["event"] == "task.finished"]
    assert finished == ["failed" if "/accounts/main" in paths else "succeeded"]
    assert {event["log_level"] for event in events} <= {"info", "debug"}
    assert await gateway.upstream.count_submits() == 1
    if paths == ["/tenants/shop"]:
        assert (await read_account(gateway))["in_flight"] == 0
    if paths == ["/accounts/main"]:
        assert (await gateway.wait_for_task(task["id"]))["error"]["code"] == "task-lost"
        await gateway.call_admin("PUT", "/tenants/shop", json={"accounts": []} | LIMITS)
        assert await read_counts(gateway) == (1, 0, 0)
