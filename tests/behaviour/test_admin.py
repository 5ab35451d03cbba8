"""Operators make, change, show and delete accounts and tenants while the gateway runs."""

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

DEFAULTS = {"floor_count": 0, "floor_money": 0, "max_price": {}, "base_url": None}


async def get_json(house: RunningGateway, path: str) -> dict[str, Any]:
    answer = await house.call_admin("GET", path)
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def put_json(house: RunningGateway, path: str, **body: Any) -> dict[str, Any]:
    answer = await house.call_admin("PUT", path, json=body)
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def test_account_as_it_is(house: RunningGateway) -> None:
    """An account shows its balance, when that was seen, its state and what is in flight, but not its key."""
    unseen = {"remaining_count": None, "remaining_money": None, "in_flight": 0, "unknown": 0}
    nothing = {"unexplained": {"count": 0, "money": 0}, "prices": {}, "looks": False}
    assert await get_json(house, "/accounts/main") == {
        "name": "main",
        "state": "open",
        "look_again_at": None,
        **DEFAULTS,
        **unseen,
        **nothing,
    }
    await house.upstream.keep_running()
    task = (await house.submit()).json()
    found = await get_json(house, "/accounts/main")
    assert found["in_flight"] == 1
    assert (found["remaining_count"]["value"], found["remaining_money"]["value"]) == (9, 300)
    assert found["remaining_count"]["seen_at"] >= task["created_at"]
    assert (await get_json(house, "/accounts"))["items"] == [found]


async def test_put_replaces_an_account(house: RunningGateway) -> None:
    """What is left out of an account gets its default, and only the key is kept."""
    rich = {"floor_count": 2, "floor_money": 1.5, "max_price": {"upscale": 0.07}}
    assert rich.items() <= (await put_json(house, "/accounts/main", **rich)).items()
    assert rich.items() <= (await get_json(house, "/accounts/main")).items()
    assert DEFAULTS.items() <= (await put_json(house, "/accounts/main")).items()
    assert (await house.submit()).status_code == 201


async def test_account_elsewhere(house: RunningGateway) -> None:
    """An account can be at an upstream of its own, whose address is kept without a slash at its end."""
    for given in ("http://127.0.0.1:9/", "https://[::1]:8443/api/v2//", "http://upstream.example/a%20b"):
        assert (await put_json(house, "/accounts/main", base_url=given))["base_url"] == given.rstrip("/")


async def test_put_replaces_a_tenant(house: RunningGateway) -> None:
    """What is left out of a tenant gets its default, and its tokens and counters stay."""
    await house.submit()
    full = {
        "limits": [{"window": "day", "tasks": 5, "money": 2.5}],
        "max_active": 3,
        "purse": "count_only",
        "kinds": ["upscale"],
        "disabled": True,
    }
    shown = await put_json(house, "/tenants/shop", accounts=["main"], **full)
    assert full.items() <= shown.items()
    used = {each["policy"]: each["used"] for each in shown["policies"]}
    assert used["day-tasks"] == 1
    shown = await put_json(house, "/tenants/shop", accounts=["main"])
    defaults: dict[str, Any] = {
        "limits": [],
        "max_active": None,
        "purse": "count_then_money",
        "kinds": None,
        "disabled": False,
    }
    assert defaults.items() <= shown.items()
    assert (await house.submit()).status_code == 201


async def test_nothing_may_be_spent(house: RunningGateway) -> None:
    """A limit of zero, in every unit, refuses everything."""
    nothing: list[dict[str, Any]] = [{"limits": [{"window": "hour", "tasks": 0}]}, {"max_active": 0}, {"kinds": []}]
    for policy in nothing:
        await house.put_tenant(**policy)
        assert (await house.submit()).status_code in {403, 429}
    await house.upstream.set_balance(count=0, money=300)
    await house.put_tenant(limits=[{"window": "hour", "money": 0}])
    await house.submit()
    answer = await house.submit()
    assert answer.status_code == 429, answer.text


async def test_limit_below_what_is_used(house: RunningGateway) -> None:
    """A limit lowered below what is used refuses at once, and leaves nothing rather than less than nothing."""
    for _ in range(3):
        await house.submit()
    await house.put_tenant(limits=[{"window": "total", "tasks": 1}])
    expect_problem(await house.submit(), 429, "quota-exceeded")
    (policy,) = (await get_json(house, "/tenants/shop"))["policies"]
    assert (policy["limit"], policy["used"], policy["remaining"]) == (1, 3, 0)


async def test_floor_lowered(house: RunningGateway) -> None:
    """An account that stopped at its floor goes on at once when the floor is lowered."""
    await put_json(house, "/accounts/main", floor_count=9, floor_money=300)
    assert (await house.submit()).status_code == 201
    expect_problem(await house.submit(), 402, "balance-exhausted")
    await put_json(house, "/accounts/main", floor_count=5, floor_money=300)
    assert (await house.submit()).status_code == 201


async def test_same_again(house: RunningGateway) -> None:
    """Putting an account as it is, key and all, forgets nothing of its balance."""
    await house.submit()
    seen = await get_json(house, "/accounts/main")
    assert seen["remaining_count"]
    assert await put_json(house, "/accounts/main", user_key=USER_KEY) == seen


async def test_changes_at_once(house: RunningGateway) -> None:
    """Of many changes made at once none is lost."""
    names = [f"tenant-{number}" for number in range(25)]
    await asyncio.gather(*(house.put_tenant(name) for name in names), *(house.new_token() for _ in range(5)))
    assert {each["name"] for each in (await get_json(house, "/tenants"))["items"]} == {"shop", *names}
    assert len((await get_json(house, "/tenants/shop"))["tokens"]) == 6


async def test_deleted_while_used(house: RunningGateway) -> None:
    """What runs or is used can't be deleted, unless by force."""
    await house.upstream.keep_running()
    await house.submit()
    assert (
        "1 submissions" in expect_problem(await house.call_admin("DELETE", "/accounts/main"), 409, "conflict")["detail"]
    )
    assert "1 tasks" in expect_problem(await house.call_admin("DELETE", "/tenants/shop"), 409, "conflict")["detail"]
    await house.call_admin("PUT", "/accounts/spare", json={"user_key": "spare"})
    await house.put_tenant("other", accounts=["spare"])
    assert "by other." in expect_problem(await house.call_admin("DELETE", "/accounts/spare"), 409, "conflict")["detail"]
    for path in ("/tenants/other", "/accounts/spare", "/tenants/shop?force=true", "/accounts/main?force=true"):
        answer = await house.call_admin("DELETE", path)
        assert (answer.status_code, answer.content) == (204, b"")
        expect_problem(await house.call_admin("DELETE", path), 404, "not-found")
        expect_problem(await house.call_admin("GET", path.partition("?")[0]), 404, "not-found")


async def test_account_deleted_by_force(house: RunningGateway) -> None:
    """A tenant whose account was deleted is told that an operator has to act, also once another has its name."""
    await house.upstream.keep_running()
    task = (await house.submit()).json()
    await house.call_admin("DELETE", "/accounts/main?force=true")
    assert (await get_json(house, "/tenants/shop"))["accounts"] == []
    expect_problem(await house.submit(), 503, "account-misconfigured")
    await house.poll_due_tasks()
    assert (await house.call("GET", f"/v1/tasks/{task['id']}")).status_code == 200
    await put_json(house, "/accounts/main", user_key=USER_KEY)
    expect_problem(await house.submit(), 503, "account-misconfigured")
    await house.put_tenant()
    assert (await house.submit()).status_code == 201


async def test_tenant_deleted_by_force(house: RunningGateway, valkey: Valkey) -> None:
    """A tenant deleted while its task runs is locked out at once, its task ends, and nothing of it stays for ever."""
    task = (await house.submit()).json()
    await house.call_admin("DELETE", "/tenants/shop?force=true")
    expect_problem(await house.call("GET", f"/v1/tasks/{task['id']}"), 401, "unauthenticated")
    expect_problem(await house.submit(), 401, "unauthenticated")
    assert house.services.registry.current.tokens == {}
    with structlog.testing.capture_logs() as events:
        await house.poll_due_tasks()
    assert [each["state"] for each in events if each["event"] == "task.finished"] == ["succeeded"]
    assert [each for each in events if each["log_level"] not in {"info", "debug"}] == []
    assert (await get_json(house, "/accounts/main"))["in_flight"] == 0
    if isinstance(house.upstream, SandboxUpstreamControl):
        account = house.services.registry.current.accounts["main"].id
        assert await _persistent_keys(valkey) == {"version", "clock", "clock:server", "registry", f"account:{account}"}


async def test_name_given_anew(house: RunningGateway) -> None:
    """A tenant with the name of a deleted one is another: no counter, token or task of the old one is its own."""
    task = (await house.submit()).json()
    await house.wait_for_task(task["id"])
    old = house.token
    await house.call_admin("DELETE", "/tenants/shop")
    await house.put_tenant(limits=[{"window": "total", "tasks": 1}])
    expect_problem(await house.call("GET", "/v1/quota", token=old), 401, "unauthenticated")
    house.token = await house.new_token()
    expect_problem(await house.call("GET", f"/v1/tasks/{task['id']}"), 404, "not-found")
    assert (await house.call("GET", "/v1/tasks")).json()["items"] == []
    (policy,) = (await house.call("GET", "/v1/quota")).json()["policies"]
    assert (policy["used"], policy["reserved"], policy["remaining"]) == (0, 0, 1)
    assert (await house.submit()).status_code == 201


async def test_reopened(house: RunningGateway) -> None:
    """An exhausted account is tried again as soon as an operator reopens it."""
    await house.upstream.set_balance(count=1, money=0)
    assert (await house.submit()).status_code == 201
    expect_problem(await house.submit(), 402, "balance-exhausted")
    shown = await get_json(house, "/accounts/main")
    assert shown["state"] == "exhausted"
    assert shown["look_again_at"]
    await house.upstream.set_balance(count=5, money=0)
    answer = await house.call_admin("POST", "/accounts/main/reopen")
    assert (answer.status_code, answer.json()["state"], answer.json()["look_again_at"]) == (200, "open", None)
    assert (await house.submit()).status_code == 201


async def test_unknown_names(house: RunningGateway) -> None:
    """What there is not is 404, under whatever name."""
    for name in ("nobody", "No Body", "%E5%95%86%E5%BA%97", "shop%0A", "%2E%2E"):
        for method, path in (
            ("GET", f"/accounts/{name}"),
            ("DELETE", f"/accounts/{name}"),
            ("POST", f"/accounts/{name}/reopen"),
            ("GET", f"/tenants/{name}"),
            ("DELETE", f"/tenants/{name}?force=true"),
            ("POST", f"/tenants/{name}/tokens"),
            ("DELETE", f"/tenants/{name}/tokens/x"),
        ):
            expect_problem(await house.call_admin(method, path), 404, "not-found")


async def test_each_port_has_its_own_token(house: RunningGateway) -> None:
    """The operators' port takes the admin token only, the tenants' port does not, and neither has the other's calls."""
    for token in (None, "Bearer", f"Bearer {house.token}", f"Bearer {ADMIN_TOKEN}x", f"Basic {ADMIN_TOKEN}"):
        headers = {"Authorization": token} if token else {}
        for method, path in (("GET", "/accounts"), ("PUT", "/tenants/x"), ("DELETE", "/accounts/main?nonsense")):
            answer = await house.http.request(method, f"{house.ops_url}/admin/v1{path}", headers=headers)
            expect_problem(answer, 401, "unauthenticated")
            assert answer.headers["www-authenticate"].startswith("Bearer ")
    expect_problem(await house.call("GET", "/v1/quota", token=ADMIN_TOKEN), 401, "unauthenticated")
    expect_problem(await house.call("GET", "/admin/v1/accounts", token=ADMIN_TOKEN), 404, "not-found")
    headers = {"Authorization": f"Bearer {house.token}"}
    expect_problem(await house.http.get(f"{house.ops_url}/v1/quota", headers=headers), 404, "not-found")


async def _persistent_keys(valkey: Valkey) -> set[str]:
    """The keys without a time to live, less their prefix."""
    connections = connect(valkey.url, timeout=5)
    client: Any = connections.commands
    try:
        keys = [key async for key in client.scan_iter()]
        return {key.decode().removeprefix("{gw}:") for key in keys if await client.pttl(key) < 0}
    finally:
        await connections.aclose()


async def test_demo_account_follows_its_key(house: RunningGateway) -> None:
    """The account that a development gateway makes gets the key that is given now, and keeps it if it is the same."""
    services = house.services
    token = await ensure_demo_token(services.registry_admin, services.registry, "first-key", None)
    made = services.registry.current.accounts["demo"]
    assert await ensure_demo_token(services.registry_admin, services.registry, "first-key", token) == token
    assert services.registry.current.accounts["demo"] == made
    await ensure_demo_token(services.registry_admin, services.registry, "second-key", token)
    changed = services.registry.current.accounts["demo"]
    assert (changed.id, changed.user_key == made.user_key) == (made.id, False)
