"""Partial changes of accounts and tenants, their preconditions, and the states of a tenant."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.legacy_client import LegacyClient
from tests.behaviour.registry_requests import get_registry
from tests.behaviour.task_readers import wait_until

SECRET = "whsec_" + "A" * 32
TENANT: dict[str, Any] = {
    "accounts": ["main"],
    "limits": [{"window": "day", "tasks": 5, "money": 2.5}, {"window": "total", "tasks": None, "money": 100}],
    "max_active": 3,
    "spending_mode": "count_only",
    "kinds": ["upscale"],
    "state": "read-only",
    "note": "Ask Li before raising a limit.",
    "webhook": {"url": "https://hooks.example/a?key=1", "allow": ["other.example"]},
}
ACCOUNT: dict[str, Any] = {
    "base_url": "https://upstream.example/api",
    "floor_count": 2,
    "floor_money": 1.5,
    "max_price": {"upscale": 0.07, "vectorize": 2},
    "note": "Invoiced\nmonthly.",
}
ACCOUNT_CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"floor_count": 7}, {"floor_count": 7}),
    ({"base_url": None, "floor_money": None}, {"base_url": None, "floor_money": 0}),
    ({"max_price": {"upscale": 3, "vectorize": None}}, {"max_price": {"upscale": 3}}),
    ({"max_price": None}, {"max_price": {}}),
    ({"note": None}, {"note": ""}),
]
TENANT_CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"state": "active"}, {"state": "active"}),
    ({"disabled": False}, {"state": "active"}),
    ({"purse": "count_then_money"}, {"spending_mode": "count_then_money"}),
    ({"limits": [{"window": "hour", "tasks": 1}]}, {"limits": [{"window": "hour", "tasks": 1, "money": None}]}),
    ({"kinds": None, "max_active": None}, {"kinds": None, "max_active": None}),
    ({"webhook": {"url": "https://new.example/"}}, {"webhook": TENANT["webhook"] | {"url": "https://new.example/"}}),
    ({"webhook": {"allow": None}}, {"webhook": TENANT["webhook"] | {"allow": []}}),
    ({"webhook": None}, {"webhook": None}),
    ({"note": "Another."}, {"note": "Another."}),
]
INVALID_PATCHES = [
    ("accounts/main", {"floor_count": -1}, "floor_count"),
    ("accounts/main", {"floor_cuont": 1}, "floor_cuont"),
    ("accounts/main", {"max_price": {"upscale": 0.001}}, "max_price.upscale"),
    ("accounts/main", {"user_key": "not printable\n"}, "user_key"),
    ("tenants/shop", {"accounts": None}, "accounts"),
    ("tenants/shop", {"accounts": ["unknown"]}, "accounts"),
    ("tenants/shop", {"limits": [{"window": "day"}]}, "limits[0]"),
    ("tenants/shop", {"webhook": {"allow": ["x"]}}, "webhook.url"),
    ("tenants/shop", {"state": "off"}, "state"),
    ("tenants/shop", {"tokens": {}}, "tokens"),
    ("tenants/shop", {"note": "x" * 2001}, "note"),
]


async def read_entry(gateway: RunningGateway, path: str) -> dict[str, Any]:
    section, name = path.split("/")
    entry: dict[str, Any] = (await get_registry(gateway)).json()[section][name]
    return entry


@pytest.mark.parametrize(
    ("path", "settings", "patch", "changed"),
    [
        *(("accounts/main", ACCOUNT, *change) for change in ACCOUNT_CHANGES),
        *(("tenants/shop", TENANT, *change) for change in TENANT_CHANGES),
    ],
)
async def test_patch_changes_what_it_names(
    gateway: RunningGateway, path: str, settings: dict[str, Any], patch: dict[str, Any], changed: dict[str, Any]
) -> None:
    assert (await gateway.call_admin("PUT", f"/{path}", json=settings)).status_code == 200
    before = await read_entry(gateway, path)
    media_type = {"Content-Type": "application/merge-patch+json"}
    response = await gateway.call_admin("PATCH", f"/{path}", json=patch, headers=media_type)
    assert response.status_code == 200, response.text
    body = response.json()
    if body.get("webhook"):
        del body["webhook"]["disabled_urls"]
    expected = settings | changed
    assert {name: body[name] for name in expected} == expected
    assert (await gateway.call_admin("GET", f"/{path}")).headers["etag"] == response.headers["etag"]
    after = await read_entry(gateway, path)
    assert {name for name in {*before, *after} if before.get(name) != after.get(name)} == changed.keys()
    # The same settings as a PUT of the result gives: no default or secret was lost.
    again = await gateway.call_admin("PUT", f"/{path}", json=expected)
    assert (again.headers["etag"], await read_entry(gateway, path)) == (response.headers["etag"], after)


@pytest.mark.parametrize(("path", "patch", "field"), INVALID_PATCHES)
async def test_invalid_patch(gateway: RunningGateway, path: str, patch: dict[str, Any], field: str) -> None:
    before = await get_registry(gateway)
    response = await gateway.call_admin("PATCH", f"/{path}", json=patch)
    assert [error["field"] for error in expect_problem(response, 422, "invalid-options")["errors"]] == [field]
    assert (await get_registry(gateway)).text == before.text


async def test_patch_of_no_object(gateway: RunningGateway) -> None:
    no_objects: list[Any] = [None, [], 5, "state"]
    for body in no_objects:
        expect_problem(await gateway.call_admin("PATCH", "/tenants/shop", json=body), 422, "invalid-options")
    expect_problem(await gateway.call_admin("PATCH", "/tenants/unknown", json={}), 404, "not-found")
    expect_problem(await gateway.call_admin("PATCH", "/accounts/unknown", json={}), 404, "not-found")


async def test_patch_keeps_secrets(gateway: RunningGateway) -> None:
    put = await gateway.call_admin("PUT", "/tenants/shop", json=TENANT)
    assert put.json()["webhook"]["secret"].startswith("whsec_")
    before = gateway.services.registry.current
    patched = await gateway.call_admin("PATCH", "/tenants/shop", json={"webhook": {"url": "https://new.example/"}})
    assert "secret" not in patched.json()["webhook"]
    await gateway.call_admin("PATCH", "/accounts/main", json={"floor_count": 1})
    after = gateway.services.registry.current
    assert after.tenants["shop"].webhook.secrets == before.tenants["shop"].webhook.secrets
    assert after.accounts["main"].user_key == before.accounts["main"].user_key
    await gateway.call_admin("PATCH", "/tenants/shop", json={"webhook": {"secret": SECRET}})
    await gateway.call_admin("PATCH", "/accounts/main", json={"user_key": "another"})
    changed = gateway.services.registry.current
    assert changed.tenants["shop"].webhook.secrets != before.tenants["shop"].webhook.secrets
    assert changed.accounts["main"].user_key != before.accounts["main"].user_key


@pytest.mark.parametrize(("path", "settings"), [("/accounts/main", ACCOUNT), ("/tenants/shop", TENANT)])
async def test_preconditions(gateway: RunningGateway, path: str, settings: dict[str, Any]) -> None:
    etag = (await gateway.call_admin("GET", path)).headers["etag"]
    match = {"If-Match": f'"other", {etag}'}
    changed = await gateway.call_admin("PATCH", path, json=settings, headers=match)
    assert (changed.status_code, changed.headers["etag"] == etag) == (200, False)
    for method in ("PATCH", "PUT"):
        expect_problem(await gateway.call_admin(method, path, json=settings, headers=match), 412, "outdated")
        present = await gateway.call_admin(method, path, json=settings, headers={"If-Match": "*"})
        assert (present.status_code, present.headers["etag"]) == (200, changed.headers["etag"])
    create = {"If-None-Match": "*"}
    expect_problem(await gateway.call_admin("PUT", path, json=settings, headers=create), 412, "outdated")
    missing, body = path[:-1], {"user_key": "another"} if "accounts" in path else settings
    expect_problem(await gateway.call_admin("PUT", missing, json=body, headers={"If-Match": "*"}), 412, "outdated")
    assert (await gateway.call_admin("PUT", missing, json=body, headers=create)).status_code == 200


async def test_states_of_a_tenant(gateway: RunningGateway) -> None:
    old_client = LegacyClient(gateway.http, gateway.url, gateway.token)
    task = (await gateway.submit()).json()
    unknown_key = await LegacyClient(gateway.http, gateway.url, "igw_unknown").check(task["id"])
    await gateway.call_admin("PATCH", "/tenants/shop", json={"state": "read-only"})
    expect_problem(await gateway.submit(), 403, "tenant-read-only")
    assert (await gateway.call("GET", f"/v1/tasks/{task['id']}")).status_code == 200
    assert (await old_client.check(task["id"]))["err_code"] == 0
    assert (await old_client.submit("submit_face_enhance_task"))["err_code"] == 1
    await gateway.call_admin("PATCH", "/tenants/shop", json={"state": "disabled"})
    expect_problem(await gateway.submit(), 403, "tenant-disabled")
    for path in (f"/v1/tasks/{task['id']}", f"/v1/tasks/{task['id']}/events", "/v1/tasks", "/v1/quota", "/v1/usage"):
        expect_problem(await gateway.call("GET", path), 403, "tenant-disabled")
    assert await old_client.check(task["id"]) == unknown_key
    assert await old_client.submit("submit_face_enhance_task") == unknown_key
    await gateway.call_admin("PATCH", "/tenants/shop", json={"state": "active"})
    assert (await gateway.submit()).status_code == 201
    assert await gateway.upstream.count_submits() == 2


async def test_log_names_a_disabled_tenant(gateway: RunningGateway) -> None:
    await gateway.call_admin("PATCH", "/tenants/shop", json={"state": "disabled"})
    with capture_logs() as events:
        await gateway.call("GET", "/v1/quota")
        await LegacyClient(gateway.http, gateway.url, gateway.token).check("task_x")
        await wait_until(lambda: len([event for event in events if event["event"] == "request.ended"]) == 2)
    ended = [event for event in events if event["event"] == "request.ended"]
    assert [(event["status"], event["tenant"]) for event in ended] == [(403, "shop"), (200, "shop")]


async def test_revoke_all(gateway: RunningGateway) -> None:
    await gateway.put_tenant("other")
    others, second = await gateway.new_token("other"), await gateway.new_token(label="second")
    listed = [token["id"] for token in (await gateway.call_admin("GET", "/tenants/shop")).json()["tokens"]]
    response = await gateway.call_admin("POST", "/tenants/shop/revoke-all")
    assert (response.status_code, response.json()) == (200, {"revoked": listed})
    for token in (gateway.token, second):
        expect_problem(await gateway.call("GET", "/v1/quota", token=token), 401, "unauthenticated")
    assert (await gateway.call("GET", "/v1/quota", token=others)).status_code == 200
    assert (await gateway.call_admin("POST", "/tenants/shop/revoke-all")).json() == {"revoked": []}
    assert (await gateway.call("GET", "/v1/quota", token=await gateway.new_token())).status_code == 200
    expect_problem(await gateway.call_admin("POST", "/tenants/unknown/revoke-all"), 404, "not-found")
