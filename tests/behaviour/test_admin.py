"""The operators' API for accounts and tenants."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from service.devstack import ensure_demo_token
from service.storage.connections import connect
from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway
from tests.behaviour.upstream_control import USER_KEY, SandboxUpstreamControl
from tests.support.valkey import Valkey

DEFAULTS = {"floor_count": 0, "floor_money": 0, "max_price": {}, "base_url": None, "note": ""}


async def get_json(gateway: RunningGateway, path: str) -> dict[str, Any]:
    response = await gateway.call_admin("GET", path)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


async def put_json(gateway: RunningGateway, path: str, **body: Any) -> dict[str, Any]:
    response = await gateway.call_admin("PUT", path, json=body)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


async def test_account_shows_balance_and_state_without_its_key(gateway: RunningGateway) -> None:
    unseen = {"remaining_count": None, "remaining_money": None, "in_flight": 0, "unknown": 0}
    nothing = {"unexplained": {"count": 0, "money": 0}, "prices": {}, "live_balance_checks": False}
    assert await get_json(gateway, "/accounts/main") == {
        "name": "main",
        "state": "open",
        "look_again_at": None,
        **DEFAULTS,
        **unseen,
        **nothing,
    }
    await gateway.upstream.keep_running()
    task = (await gateway.submit()).json()
    account = await get_json(gateway, "/accounts/main")
    assert account["in_flight"] == 1
    assert (account["remaining_count"]["value"], account["remaining_money"]["value"]) == (9, 300)
    assert account["remaining_count"]["seen_at"] >= task["created_at"]
    assert (await get_json(gateway, "/accounts"))["items"] == [account]


async def test_put_replaces_an_account(gateway: RunningGateway) -> None:
    rich = {"floor_count": 2, "floor_money": 1.5, "max_price": {"upscale": 0.07}}
    assert rich.items() <= (await put_json(gateway, "/accounts/main", **rich)).items()
    assert rich.items() <= (await get_json(gateway, "/accounts/main")).items()
    assert DEFAULTS.items() <= (await put_json(gateway, "/accounts/main")).items()
    assert (await gateway.submit()).status_code == 201


async def test_account_with_its_own_base_url(gateway: RunningGateway) -> None:
    for url in ("http://127.0.0.1:9/", "https://[::1]:8443/api/v2//", "http://upstream.example/a%20b"):
        assert (await put_json(gateway, "/accounts/main", base_url=url))["base_url"] == url.rstrip("/")


async def test_put_replaces_a_tenant(gateway: RunningGateway) -> None:
    await gateway.submit()
    full = {
        "limits": [{"window": "day", "tasks": 5, "money": 2.5}],
        "max_active": 3,
        "spending_mode": "count_only",
        "kinds": ["upscale"],
        "state": "disabled",
    }
    tenant = await put_json(gateway, "/tenants/shop", accounts=["main"], **full)
    assert full.items() <= tenant.items()
    used = {policy["policy"]: policy["used"] for policy in tenant["policies"]}
    assert used["day-tasks"] == 1
    tenant = await put_json(gateway, "/tenants/shop", accounts=["main"])
    defaults: dict[str, Any] = {
        "limits": [],
        "max_active": None,
        "spending_mode": "count_then_money",
        "kinds": None,
        "state": "active",
    }
    assert defaults.items() <= tenant.items()
    assert (await gateway.submit()).status_code == 201


async def test_zero_limit_refuses_everything(gateway: RunningGateway) -> None:
    nothing: list[dict[str, Any]] = [{"limits": [{"window": "hour", "tasks": 0}]}, {"max_active": 0}, {"kinds": []}]
    for policy in nothing:
        await gateway.put_tenant(**policy)
        assert (await gateway.submit()).status_code in {403, 429}
    await gateway.upstream.set_balance(count=0, money=300)
    await gateway.put_tenant(limits=[{"window": "hour", "money": 0}])
    await gateway.submit()
    response = await gateway.submit()
    assert response.status_code == 429, response.text


async def test_limit_below_the_use(gateway: RunningGateway) -> None:
    for _ in range(3):
        await gateway.submit()
    await gateway.put_tenant(limits=[{"window": "total", "tasks": 1}])
    expect_problem(await gateway.submit(), 429, "quota-exceeded")
    (policy,) = (await get_json(gateway, "/tenants/shop"))["policies"]
    assert (policy["limit"], policy["used"], policy["remaining"]) == (1, 3, 0)


async def test_lowered_floor_reopens_the_account(gateway: RunningGateway) -> None:
    await put_json(gateway, "/accounts/main", floor_count=9, floor_money=300)
    assert (await gateway.submit()).status_code == 201
    expect_problem(await gateway.submit(), 402, "balance-exhausted")
    await put_json(gateway, "/accounts/main", floor_count=5, floor_money=300)
    assert (await gateway.submit()).status_code == 201


async def test_identical_put_keeps_the_balance(gateway: RunningGateway) -> None:
    await gateway.submit()
    account = await get_json(gateway, "/accounts/main")
    assert account["remaining_count"]
    assert await put_json(gateway, "/accounts/main", user_key=USER_KEY) == account


async def test_concurrent_changes_are_all_applied(gateway: RunningGateway) -> None:
    names = [f"tenant-{number}" for number in range(25)]
    await asyncio.gather(*(gateway.put_tenant(name) for name in names), *(gateway.new_token() for _ in range(5)))
    assert {item["name"] for item in (await get_json(gateway, "/tenants"))["items"]} == {"shop", *names}
    assert len((await get_json(gateway, "/tenants/shop"))["tokens"]) == 6


async def test_deletion_of_used_objects_needs_force(gateway: RunningGateway) -> None:
    await gateway.upstream.keep_running()
    await gateway.submit()
    assert (
        "1 submissions"
        in expect_problem(await gateway.call_admin("DELETE", "/accounts/main"), 409, "conflict")["detail"]
    )
    assert "1 tasks" in expect_problem(await gateway.call_admin("DELETE", "/tenants/shop"), 409, "conflict")["detail"]
    await gateway.call_admin("PUT", "/accounts/spare", json={"user_key": "spare"})
    await gateway.put_tenant("other", accounts=["spare"])
    assert "other." in expect_problem(await gateway.call_admin("DELETE", "/accounts/spare"), 409, "conflict")["detail"]
    for path in ("/tenants/other", "/accounts/spare", "/tenants/shop?force=true", "/accounts/main?force=true"):
        response = await gateway.call_admin("DELETE", path)
        assert (response.status_code, response.content) == (204, b"")
        expect_problem(await gateway.call_admin("DELETE", path), 404, "not-found")
        expect_problem(await gateway.call_admin("GET", path.partition("?")[0]), 404, "not-found")


async def test_forced_account_deletion(gateway: RunningGateway) -> None:
    await gateway.upstream.keep_running()
    task = (await gateway.submit()).json()
    await gateway.call_admin("DELETE", "/accounts/main?force=true")
    assert (await get_json(gateway, "/tenants/shop"))["accounts"] == []
    expect_problem(await gateway.submit(), 503, "account-misconfigured")
    await gateway.poll_due_tasks()
    assert (await gateway.call("GET", f"/v1/tasks/{task['id']}")).status_code == 200
    await put_json(gateway, "/accounts/main", user_key=USER_KEY)
    expect_problem(await gateway.submit(), 503, "account-misconfigured")
    await gateway.put_tenant()
    assert (await gateway.submit()).status_code == 201


async def test_forced_tenant_deletion(gateway: RunningGateway, valkey: Valkey) -> None:
    task = (await gateway.submit()).json()
    await gateway.call_admin("DELETE", "/tenants/shop?force=true")
    expect_problem(await gateway.call("GET", f"/v1/tasks/{task['id']}"), 401, "unauthenticated")
    expect_problem(await gateway.submit(), 401, "unauthenticated")
    assert gateway.services.registry.current.tokens == {}
    with structlog.testing.capture_logs() as events:
        await gateway.poll_due_tasks()
    assert [event["state"] for event in events if event["event"] == "task.finished"] == ["succeeded"]
    assert [event for event in events if event["log_level"] not in {"info", "debug"}] == []
    assert (await get_json(gateway, "/accounts/main"))["in_flight"] == 0
    if isinstance(gateway.upstream, SandboxUpstreamControl):
        account = gateway.services.registry.current.accounts["main"].id
        assert await _persistent_keys(valkey) == {"version", "clock", "clock:server", "registry", f"account:{account}"}


async def test_reused_tenant_name_inherits_nothing(gateway: RunningGateway) -> None:
    task = (await gateway.submit()).json()
    await gateway.wait_for_task(task["id"])
    old = gateway.token
    await gateway.call_admin("DELETE", "/tenants/shop")
    await gateway.put_tenant(limits=[{"window": "total", "tasks": 1}])
    expect_problem(await gateway.call("GET", "/v1/quota", token=old), 401, "unauthenticated")
    gateway.token = await gateway.new_token()
    expect_problem(await gateway.call("GET", f"/v1/tasks/{task['id']}"), 404, "not-found")
    assert (await gateway.call("GET", "/v1/tasks")).json()["items"] == []
    (policy,) = (await gateway.call("GET", "/v1/quota")).json()["policies"]
    assert (policy["used"], policy["reserved"], policy["remaining"]) == (0, 0, 1)
    assert (await gateway.submit()).status_code == 201


async def test_reopened_account_is_tried_at_once(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(count=1, money=0)
    assert (await gateway.submit()).status_code == 201
    expect_problem(await gateway.submit(), 402, "balance-exhausted")
    account = await get_json(gateway, "/accounts/main")
    assert account["state"] == "exhausted"
    assert account["look_again_at"]
    await gateway.upstream.set_balance(count=5, money=0)
    response = await gateway.call_admin("POST", "/accounts/main/reopen")
    assert (response.status_code, response.json()["state"], response.json()["look_again_at"]) == (200, "open", None)
    assert (await gateway.submit()).status_code == 201


async def test_unknown_names_are_404(gateway: RunningGateway) -> None:
    for name in ("unknown", "No Body", "%E5%95%86%E5%BA%97", "shop%0A", "%2E%2E"):
        for method, path in (
            ("GET", f"/accounts/{name}"),
            ("DELETE", f"/accounts/{name}"),
            ("POST", f"/accounts/{name}/reopen"),
            ("GET", f"/tenants/{name}"),
            ("DELETE", f"/tenants/{name}?force=true"),
            ("POST", f"/tenants/{name}/tokens"),
            ("DELETE", f"/tenants/{name}/tokens/x"),
        ):
            expect_problem(await gateway.call_admin(method, path), 404, "not-found")


async def test_tokens_are_per_port(gateway: RunningGateway) -> None:
    for token in (None, "Bearer", f"Bearer {gateway.token}", f"Bearer {ADMIN_TOKEN}x", f"Basic {ADMIN_TOKEN}"):
        headers = {"Authorization": token} if token else {}
        for method, path in (("GET", "/accounts"), ("PUT", "/tenants/x"), ("DELETE", "/accounts/main?nonsense")):
            response = await gateway.http.request(method, f"{gateway.ops_url}/admin/v1{path}", headers=headers)
            expect_problem(response, 401, "unauthenticated")
            assert response.headers["www-authenticate"].startswith("Bearer ")
    expect_problem(await gateway.call("GET", "/v1/quota", token=ADMIN_TOKEN), 401, "unauthenticated")
    expect_problem(await gateway.call("GET", "/admin/v1/accounts", token=ADMIN_TOKEN), 404, "not-found")
    headers = {"Authorization": f"Bearer {gateway.token}"}
    expect_problem(await gateway.http.get(f"{gateway.ops_url}/v1/quota", headers=headers), 404, "not-found")


async def _persistent_keys(valkey: Valkey) -> set[str]:
    connections = connect(valkey.url, timeout=5)
    client: Any = connections.commands
    try:
        keys = [key async for key in client.scan_iter()]
        return {key.decode().removeprefix("{gw}:") for key in keys if await client.pttl(key) < 0}
    finally:
        await connections.aclose()


async def test_dev_account_follows_the_configured_key(gateway: RunningGateway) -> None:
    services = gateway.services
    token = await ensure_demo_token(services.registry_admin, services.registry, "first-key", None)
    made = services.registry.current.accounts["demo"]
    assert await ensure_demo_token(services.registry_admin, services.registry, "first-key", token) == token
    assert services.registry.current.accounts["demo"] == made
    await ensure_demo_token(services.registry_admin, services.registry, "second-key", token)
    changed = services.registry.current.accounts["demo"]
    assert (changed.id, changed.user_key == made.user_key) == (made.id, False)
