"""The operators' API for accounts, tenants and tokens, and their view of tasks."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import pytest

from service.crypto import generate_secret_key
from service.devstack import ensure_demo_token
from service.storage.redis import READ_COMMAND
from tests.behaviour import gateway_fixture
from tests.behaviour.clients import LegacyClient
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, USER_KEY, RunningGateway, run_real_gateway
from tests.behaviour.requests import (
    expect_invalid,
    expect_json,
    expect_problem,
    run_task,
    submission_id_of,
    submit_and_lose_response,
)
from tests.support.valkey import Valkey

ACCOUNT_DEFAULTS = {"floor_count": 0, "floor_money": 0, "max_price": {}, "base_url": None, "note": ""}
ACCOUNT: dict[str, Any] = {
    "base_url": "https://upstream.example/api",
    "floor_count": 2,
    "floor_money": 1.5,
    "max_price": {"upscale": 0.07, "vectorize": 2},
    "note": "Invoiced\nmonthly.",
}
WITH_KEY = {"user_key": USER_KEY}
"""Needed for another base URL."""
TENANT: dict[str, Any] = {
    "accounts": ["main"],
    "limits": [
        {"window": "day", "tasks": 5, "money": 2.5},
        {"window": "total", "tasks": None, "money": 100, "warn_at": [50, 95]},
    ],
    "max_active": 3,
    "spending_mode": "count_only",
    "kinds": ["upscale"],
    "state": "read-only",
    "note": "Ask Li before raising a limit.",
    "webhook": {"url": "https://hooks.example/a?key=1", "allow": ["other.example"]},
    "allow_image_url": ["images.example:8443", "10.0.0.0/8"],
}
Change = tuple[dict[str, Any], dict[str, Any]]
"""A patch, and what it changes."""
ACCOUNT_CHANGES: list[Change] = [
    ({"floor_count": 7}, {"floor_count": 7}),
    ({"base_url": None, "floor_money": None} | WITH_KEY, {"base_url": None, "floor_money": 0}),
    ({"max_price": {"upscale": 3, "vectorize": None}}, {"max_price": {"upscale": 3}}),
    ({"max_price": None, "note": None}, {"max_price": {}, "note": ""}),
]
TENANT_CHANGES: list[Change] = [
    ({}, {}),
    ({"disabled": False}, {"state": "active"}),
    ({"purse": "count_then_money"}, {"spending_mode": "count_then_money"}),
    ({"limits": [{"window": "hour", "tasks": 1}]}, {"limits": [{"window": "hour", "tasks": 1, "money": None}]}),
    ({"kinds": None, "max_active": None}, {"kinds": None, "max_active": None}),
    ({"webhook": {"allow": None}}, {"webhook": TENANT["webhook"] | {"allow": []}}),
    ({"allow_image_url": None}, {"allow_image_url": []}),
    ({"allow_image_url": ["A.example", "a.example"]}, {"allow_image_url": ["a.example"]}),
    ({"webhook": None, "note": "Another."}, {"webhook": None, "note": "Another."}),
]


async def get_json(gateway: RunningGateway, path: str) -> dict[str, Any]:
    return expect_json(await gateway.call_admin("GET", path))


async def put_json(gateway: RunningGateway, path: str, **body: Any) -> dict[str, Any]:
    return expect_json(await gateway.call_admin("PUT", path, json=body))


async def create_token(gateway: RunningGateway, **body: Any) -> dict[str, Any]:
    response = await gateway.call_admin("POST", "/tenants/shop/tokens", json=body)
    assert response.headers["cache-control"] == "no-store"
    return expect_json(response, 201)


async def is_token_valid(gateway: RunningGateway, token: str) -> bool:
    response = await gateway.call("GET", "/v1/quota", token=token)
    if response.status_code != 200:
        expect_problem(response, 401, "unauthenticated")
    return response.status_code == 200


async def list_task_ids(gateway: RunningGateway, query: str) -> list[str]:
    return [task["id"] for task in (await get_json(gateway, f"/tasks?{query}"))["items"]]


@pytest.mark.smoke
async def test_account_shows_balance_and_state_without_its_key(gateway: RunningGateway) -> None:
    assert await get_json(gateway, "/accounts/main") == ACCOUNT_DEFAULTS | {
        "name": "main",
        "state": "open",
        "look_again_at": None,
        "remaining_count": None,
        "remaining_money": None,
        "in_flight": 0,
        "unknown": 0,
        "unexplained": {"count": 0, "money": 0},
        "prices": {},
        "live_balance_checks": False,
    }
    await gateway.upstream.keep_running()
    task = (await gateway.submit()).json()
    account = await get_json(gateway, "/accounts/main")
    assert account["in_flight"] == 1
    assert (account["remaining_count"]["value"], account["remaining_money"]["value"]) == (9, 300)
    assert account["remaining_count"]["seen_at"] >= task["created_at"]
    assert (await get_json(gateway, "/accounts"))["items"] == [account]
    assert await put_json(gateway, "/accounts/main", user_key=USER_KEY) == account


async def test_base_urls_without_tls_in_production(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "3f8a1c5e9b7d2046f1e3a5c7d9b80246"
    monkeypatch.setattr(gateway_fixture, "ADMIN_TOKEN", token)
    keys = generate_secret_key()
    async with run_real_gateway(
        valkey, GATEWAY_ENV="production", GATEWAY_SECRET_KEYS=keys, GATEWAY_ADMIN_TOKEN=token
    ) as gateway:
        before = gateway.services.registry.current
        for host in ("images.example", "134744072", "0x8.010.0x808", "8.8.8.8.", "[::ffff:8.8.8.8]"):
            spec = {"base_url": f"http://{host}/api", "user_key": USER_KEY}
            for path in ("/accounts/new", "/accounts/main"):
                expect_invalid(await gateway.call_admin("PUT", path, json=spec), "base_url")
            expect_invalid(await gateway.call_admin("PATCH", "/accounts/main", json=spec), "base_url")
            document = {"accounts": {"new": spec | {"user_key": {"value": USER_KEY}}}}
            refused = await gateway.call_admin("PUT", "/registry", json=document)
            expect_invalid(refused, "accounts.new.base_url")
        assert gateway.services.registry.current is before
        for url in ("https://images.example", "http://egress.svc:8080", "http://10.1.2.3"):
            await put_json(gateway, "/accounts/main", base_url=url, user_key=USER_KEY)
        with monkeypatch.context() as former_rules:
            former_rules.setattr(gateway.services.registry_admin, "base_url_error", lambda _: None)
            await put_json(gateway, "/accounts/main", base_url="http://images.example", user_key=USER_KEY)
        expect_json(await gateway.call_admin("PATCH", "/accounts/main", json={"floor_count": 9}))  # it keeps its URL


async def test_put_replaces_accounts_and_tenants(gateway: RunningGateway) -> None:
    url = "https://[::1]:8443/api/v2//"
    assert (await put_json(gateway, "/accounts/main", base_url=url, **WITH_KEY))["base_url"] == url.rstrip("/")
    assert ACCOUNT.items() <= (await put_json(gateway, "/accounts/main", **ACCOUNT, **WITH_KEY)).items()
    assert ACCOUNT_DEFAULTS.items() <= (await put_json(gateway, "/accounts/main", **WITH_KEY)).items()
    defaults = await get_json(gateway, "/tenants/shop")
    tenant = await put_json(gateway, "/tenants/shop", **TENANT)
    del tenant["webhook"]["disabled_urls"], tenant["webhook"]["secret"]
    assert TENANT.items() <= tenant.items()
    assert await put_json(gateway, "/tenants/shop", accounts=["main"]) == defaults
    assert (defaults["limits"], defaults["max_active"], defaults["spending_mode"]) == ([], None, "count_then_money")
    assert (await gateway.submit()).status_code == 201


async def test_lowered_floor_or_reopening_serves_the_account_again(gateway: RunningGateway) -> None:
    await put_json(gateway, "/accounts/main", floor_count=9, floor_money=300)
    assert (await gateway.submit()).status_code == 201
    expect_problem(await gateway.submit(), 402, "balance-exhausted")
    await put_json(gateway, "/accounts/main", floor_count=8, floor_money=300)
    assert (await gateway.submit()).status_code == 201
    expect_problem(await gateway.submit(), 402, "balance-exhausted")
    assert (await get_json(gateway, "/accounts/main"))["look_again_at"]
    await gateway.upstream.set_balance(count=50, money=300)
    reopened = expect_json(await gateway.call_admin("POST", "/accounts/main/reopen"))
    assert (reopened["state"], reopened["look_again_at"]) == ("open", None)
    assert (await gateway.submit()).status_code == 201


async def test_deletion_of_what_is_used_needs_force(gateway: RunningGateway) -> None:
    await gateway.upstream.keep_running()
    await gateway.submit()
    await put_json(gateway, "/accounts/spare", user_key="spare")
    await put_json(gateway, "/tenants/shop", accounts=["spare"])
    for path in ("/accounts/main", "/accounts/spare", "/tenants/shop"):  # a submission, a tenant, a task
        expect_problem(await gateway.call_admin("DELETE", path), 409, "conflict")
    for path in ("/accounts/main", "/accounts/spare", "/tenants/shop"):
        forced = await gateway.call_admin("DELETE", f"{path}?force=true")
        assert (forced.status_code, forced.content) == (204, b"")
        for method in ("GET", "DELETE"):
            expect_problem(await gateway.call_admin(method, path), 404, "not-found")


@pytest.mark.parametrize(
    ("section", "name", "settings", "changes"),
    [("accounts", "main", ACCOUNT, ACCOUNT_CHANGES), ("tenants", "shop", TENANT, TENANT_CHANGES)],
)
async def test_patch_changes_what_it_names(
    gateway: RunningGateway, section: str, name: str, settings: dict[str, Any], changes: list[Change]
) -> None:
    async def read_entry() -> dict[str, Any]:
        entry: dict[str, Any] = (await get_json(gateway, "/registry"))[section][name]
        return entry

    path, media_type = f"/{section}/{name}", {"Content-Type": "application/merge-patch+json"}
    for patch, changed in changes:
        await put_json(gateway, path, **settings, **(WITH_KEY if settings is ACCOUNT else {}))
        before = await read_entry()
        response = await gateway.call_admin("PATCH", path, json=patch, headers=media_type)
        patched = expect_json(response)
        if patched.get("webhook"):
            del patched["webhook"]["disabled_urls"]
        expected = settings | changed
        assert {field: patched[field] for field in expected} == expected
        after = await read_entry()
        assert {name for name in {*before, *after} if before.get(name) != after.get(name)} == changed.keys()
        # The same settings as a PUT of the result gives: no default or secret was lost.
        again = await gateway.call_admin("PUT", path, json=expected)
        assert (again.headers["etag"], await read_entry()) == (response.headers["etag"], after)
    expect_invalid(await gateway.call_admin("PATCH", path, content=b"[]"), "body")


async def test_patch_keeps_or_replaces_secrets(gateway: RunningGateway) -> None:
    async def patch_both(webhook: dict[str, str], account: dict[str, Any]) -> tuple[Any, Any]:
        patched = expect_json(await gateway.call_admin("PATCH", "/tenants/shop", json={"webhook": webhook}))
        assert "secret" not in patched["webhook"]
        expect_json(await gateway.call_admin("PATCH", "/accounts/main", json=account))
        current = gateway.services.registry.current
        return current.tenants["shop"].webhook.secrets, current.accounts["main"].user_key

    assert (await put_json(gateway, "/tenants/shop", **TENANT))["webhook"]["secret"].startswith("whsec_")
    before = await patch_both({}, {})
    assert await patch_both({"url": "https://new.example/"}, {"floor_count": 1}) == before
    after = await patch_both({"secret": "whsec_" + "A" * 32}, {"user_key": "another"})
    assert not {*map(str, before)} & {*map(str, after)}


@pytest.mark.parametrize(("path", "settings"), [("/accounts/main", ACCOUNT | WITH_KEY), ("/tenants/shop", TENANT)])
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
    expect_problem(await gateway.call_admin("PATCH", missing, json=body), 404, "not-found")
    expect_problem(await gateway.call_admin("PUT", missing, json=body, headers={"If-Match": "*"}), 412, "outdated")
    assert (await gateway.call_admin("PUT", missing, json=body, headers=create)).status_code == 200


async def test_states_of_a_tenant(gateway: RunningGateway) -> None:
    old_client = LegacyClient(gateway.http, gateway.url, gateway.token)
    task = (await gateway.submit(headers={"Idempotency-Key": "k"})).json()
    unknown_key = await LegacyClient(gateway.http, gateway.url, "igw_unknown").check(task["id"])
    no_kinds: list[str] = []
    for kinds in (["upscale"], no_kinds):
        await gateway.call_admin("PATCH", "/tenants/shop", json={"kinds": kinds})
        expect_problem(await gateway.submit(), 403, "kind-not-allowed")
    await gateway.call_admin("PATCH", "/tenants/shop", json={"kinds": None, "state": "read-only"})
    for headers in ({}, {"Idempotency-Key": "k"}):
        expect_problem(await gateway.submit(image=b"not read", headers=headers), 403, "tenant-read-only")
    assert (await gateway.call("GET", f"/v1/tasks/{task['id']}")).status_code == 200
    assert (await old_client.check(task["id"]))["err_code"] == 0
    assert (await old_client.submit("submit_face_enhance_task"))["err_code"] == 1
    await gateway.call_admin("PATCH", "/tenants/shop", json={"state": "disabled"})
    expect_problem(await gateway.submit(), 403, "tenant-disabled")
    for path in (f"/v1/tasks/{task['id']}", f"/v1/tasks/{task['id']}/events", "/v1/tasks", "/v1/usage"):
        expect_problem(await gateway.call("GET", path), 403, "tenant-disabled")
    assert await old_client.submit("submit_face_enhance_task") == unknown_key
    assert await old_client.check(task["id"]) == unknown_key
    await gateway.call_admin("PATCH", "/tenants/shop", json={"state": "active"})
    assert (await gateway.submit()).status_code == 201
    assert await gateway.upstream.count_submits() == 2


@pytest.mark.smoke
async def test_list_of_many_tenants_reads_the_store_in_batches(gateway: RunningGateway) -> None:
    tenant = {"accounts": ["main"], "limits": [{"window": "day", "tasks": 5}]}
    names = [f"tenant-{number:03}" for number in range(150)]
    expect_json(await gateway.call_admin("PUT", "/registry", json={"tenants": dict.fromkeys(names, tenant)}))
    token = await gateway.new_token(names[-1])
    await run_task(gateway, token=token)
    metrics = gateway.services.metrics.registry
    labels = {"command": READ_COMMAND, "outcome": "ok"}
    before = metrics.get_sample_value("gateway_redis_calls_total", labels) or 0

    shop, *listed = (await get_json(gateway, "/tenants"))["items"]

    assert (metrics.get_sample_value("gateway_redis_calls_total", labels) or 0) - before <= 10
    assert [item["name"] for item in (shop, *listed)] == ["shop", *names]
    assert [item["policies"][0]["used"] for item in listed] == [0] * 149 + [1]
    assert [len(item["tokens"]) for item in (shop, *listed)] == [1] + [0] * 149 + [1]


async def test_tokens_are_shown_once_and_revoked(gateway: RunningGateway) -> None:
    made = await create_token(gateway, label="生产", expires_at="2999-12-31T23:30:00+08:00")
    assert made["expires_at"] == "2999-12-31T15:30:00Z"
    shown = {token["id"]: token for token in (await get_json(gateway, "/tenants/shop"))["tokens"]}[made["id"]]
    assert shown.keys() == {"id", "label", "created_at", "expires_at"}
    assert (shown["label"], shown["expires_at"]) == ("生产", made["expires_at"])
    without_body = expect_json(await gateway.call_admin("POST", "/tenants/shop/tokens"), 201)
    assert without_body["expires_at"] is None
    await gateway.put_tenant("other")
    expect_problem(await gateway.call_admin("DELETE", f"/tenants/other/tokens/{made['id']}"), 404, "not-found")
    assert await is_token_valid(gateway, made["token"])
    response = await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{made['id']}")
    assert (response.status_code, response.content) == (204, b"")
    expect_problem(await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{made['id']}"), 404, "not-found")
    tokens = [made["token"], gateway.token, without_body["token"], await gateway.new_token("other")]
    assert [await is_token_valid(gateway, token) for token in tokens] == [False, True, True, True]
    listed = [token["id"] for token in (await get_json(gateway, "/tenants/shop"))["tokens"]]
    revoked = expect_json(await gateway.call_admin("POST", "/tenants/shop/revoke-all"))
    assert (len(listed), revoked) == (2, {"revoked": listed})
    assert [await is_token_valid(gateway, token) for token in tokens] == [False, False, False, True]


async def test_token_ends_at_its_expiry_or_grace(gateway: RunningGateway) -> None:
    now = float(int(time.time()))
    gateway.services.registry_admin.now = gateway.services.tenant_auth._now = lambda: now
    expiring = await create_token(gateway, expires_at=datetime.fromtimestamp(now + 30, UTC).isoformat())
    revoked, kept = await create_token(gateway), await create_token(gateway)
    await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{revoked['id']}?grace=30")
    for token in (expiring, revoked):  # a later grace never extends it
        await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{token['id']}?grace=3600")
    for seconds, is_valid in ((29.999, True), (0.001, False)):
        now += seconds
        assert [await is_token_valid(gateway, token["token"]) for token in (expiring, revoked)] == [is_valid] * 2
    assert await is_token_valid(gateway, kept["token"])
    listed = {token["id"] for token in (await get_json(gateway, "/tenants/shop"))["tokens"]}
    assert listed & {kept["id"], expiring["id"], revoked["id"]} == {kept["id"]}
    await create_token(gateway)
    assert not {expiring["id"], revoked["id"]} & gateway.services.registry.current.tokens.keys()


@pytest.mark.smoke
async def test_each_port_has_its_own_routes_and_tokens(gateway: RunningGateway) -> None:
    for token in (None, "Bearer", f"Bearer {gateway.token}", f"Bearer {ADMIN_TOKEN}x", f"Basic {ADMIN_TOKEN}"):
        headers = {"Authorization": token} if token else {}
        for method, path in (("GET", "/accounts"), ("DELETE", "/accounts/main?nonsense")):
            response = await gateway.http.request(method, f"{gateway.ops_url}/admin/v1{path}", headers=headers)
            expect_problem(response, 401, "unauthenticated")
            assert response.headers["www-authenticate"].startswith("Bearer ")
    expect_problem(await gateway.call("GET", "/v1/quota", token=ADMIN_TOKEN), 401, "unauthenticated")
    for path in ("/metrics", "/admin/v1/tenants", "/admin/v1/accounts/main", "/admin"):
        expect_problem(await gateway.call("GET", path, token=ADMIN_TOKEN), 404, "not-found")
    for path in ("/v1/quota", "/v1/tasks", "/api/check_task_status", "/"):
        headers = {"Authorization": f"Bearer {gateway.token}"}
        expect_problem(await gateway.http.get(gateway.ops_url + path, headers=headers), 404, "not-found")


async def test_operators_read_and_list_tasks_of_all_tenants(gateway: RunningGateway) -> None:
    made = [await run_task(gateway, kind) for kind in ("seamless", "vectorize", "seamless")][::-1]
    await gateway.put_tenant("other")
    foreign = (await gateway.submit(token=await gateway.new_token("other"))).json()
    for tenant, task in (("shop", made[0]), ("other", foreign)):
        submission = submission_id_of(gateway, task)
        expected = task | {"submission": submission, "tenant": tenant, "account": "main"}
        for task_or_submission in (task["id"], submission):
            assert await get_json(gateway, f"/tasks/{task_or_submission}") == expected
    first = await get_json(gateway, "/tasks?tenant=shop&limit=2")
    second = await get_json(gateway, f"/tasks?tenant=shop&limit=2&cursor={first['next_cursor']}")
    assert [task["id"] for task in first["items"] + second["items"]] == [task["id"] for task in made]
    assert second["next_cursor"] is None
    assert await list_task_ids(gateway, "tenant=shop&kind=vectorize&state=succeeded") == [made[1]["id"]]
    assert await list_task_ids(gateway, "tenant=other&state=queued") == [foreign["id"]]
    foreign_cursor = await gateway.call_admin("GET", f"/tasks?tenant=other&cursor={first['next_cursor']}")
    expect_problem(foreign_cursor, 400, "malformed-request")
    lost = await submit_and_lose_response(gateway)
    expect_problem(await gateway.call_admin("GET", f"/tasks/{lost}"), 404, "not-found")


async def test_demo_account_follows_the_configured_key(gateway: RunningGateway) -> None:
    services = gateway.services
    token = await ensure_demo_token(services.registry_admin, services.registry, "first-key", None)
    made = services.registry.current.accounts["demo"]
    assert await ensure_demo_token(services.registry_admin, services.registry, "first-key", token) == token
    assert services.registry.current.accounts["demo"] == made
    await ensure_demo_token(services.registry_admin, services.registry, "second-key", token)
    changed = services.registry.current.accounts["demo"]
    assert (changed.id, changed.user_key == made.user_key) == (made.id, False)
