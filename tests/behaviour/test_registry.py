"""The registry as one document."""

from __future__ import annotations

from typing import Any

import pytest
import structlog

from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway, run_fake_gateway
from tests.behaviour.registry_requests import (
    ACCOUNT_KEY,
    FULL_REGISTRY,
    HOOK_SECRET,
    apply_registry,
    get_registry,
    put_registry,
)
from tests.behaviour.upstream_control import USER_KEY


async def test_document_has_no_secrets(gateway: RunningGateway) -> None:
    response = await get_registry(gateway)
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


async def test_document_is_applied_in_one_version(gateway: RunningGateway) -> None:
    before = gateway.services.registry.current
    applied = await apply_registry(gateway, FULL_REGISTRY)
    assert applied["applied"]
    after = gateway.services.registry.current
    assert after.version == before.version + 1
    assert after.accounts["main"].id == before.accounts["main"].id
    document = (await get_registry(gateway)).json()
    for token in before.tokens:  # stays without `prune`
        del document["tenants"]["shop"]["tokens"][token]
    for section in ("accounts", "tenants"):
        for name, sent in FULL_REGISTRY[section].items():
            sent_part = {key: item for key, item in document[section][name].items() if key in sent}
            assert _without_secrets(sent_part) == _without_secrets(sent)
    listed = (await gateway.call_admin("GET", "/tenants/shop")).json()
    assert listed["accounts"] == ["spare", "main"]
    assert {item["id"] for item in listed["tokens"]} == {"0123456789ab", *before.tokens}
    expect_problem(await gateway.submit(), 403, "tenant-read-only")


async def test_reapplying_changes_nothing(gateway: RunningGateway) -> None:
    await apply_registry(gateway, FULL_REGISTRY)
    version = gateway.services.registry.current.version
    current = (await get_registry(gateway)).json()
    for document, query in ((FULL_REGISTRY, ""), (current, ""), (current, "?prune=true")):
        applied = await apply_registry(gateway, document, query)
        assert (applied["applied"], applied["differences"], applied["generated_secrets"]) == (False, [], {})
    assert gateway.services.registry.current.version == version


async def test_dry_run_reports_every_difference(gateway: RunningGateway) -> None:
    await apply_registry(gateway, FULL_REGISTRY)
    version = gateway.services.registry.current.version
    document = (await get_registry(gateway)).json()
    document["accounts"]["main"]["floor_count"] = 3
    document["accounts"]["main"]["user_key"]["value"] = "quite-another-key"
    document["tenants"]["shop"] |= {"accounts": ["main"], "kinds": None}
    document["tenants"]["press"] = {"accounts": ["main"], "webhook": {"url": "https://hooks.example/b"}}
    del document["accounts"]["spare"]
    applied = await apply_registry(gateway, document, "?dry_run=true&prune=true")
    press = {"accounts": ["main"], "webhook": {"url": "https://hooks.example/b"}}
    assert [list(difference.values()) for difference in applied["differences"]] == [
        ["accounts.main.floor_count", "changed", 2, 3],
        ["accounts.main.user_key.value", "changed"],
        ["accounts.spare", "removed", {"id": _account_id(gateway, "spare"), "user_key": {"file": "spare.key"}}],
        ["tenants.press", "added", press],
        ["tenants.press.webhook.secret.value", "added"],
        ["tenants.shop.accounts", "changed", ["spare", "main"], ["main"]],
        ["tenants.shop.kinds", "removed", ["upscale"]],
    ]
    assert (applied["applied"], applied["generated_secrets"], applied["unmanaged"]) == (False, {}, [])
    assert gateway.services.registry.current.version == version


async def test_webhook_query_is_hidden_in_differences(gateway: RunningGateway) -> None:
    hook = {"url": "https://hooks.example/a?key=first-secret"}
    added = await apply_registry(
        gateway, {"accounts": {}, "tenants": {"press": {"accounts": ["main"], "webhook": hook}}}
    )
    assert added["differences"][0]["after"]["webhook"]["url"] == "https://hooks.example/a?…"
    document = (await get_registry(gateway)).json()
    document["tenants"]["press"]["webhook"]["url"] = "https://hooks.example/a?key=other-secret"
    changed = await apply_registry(gateway, document)
    (difference,) = changed["differences"]
    assert difference == {
        "path": "tenants.press.webhook.url",
        "action": "changed",
        "before": "https://hooks.example/a?…",
        "after": "https://hooks.example/a?…",
    }
    assert (
        gateway.services.registry.current.tenants["press"].webhook.url == document["tenants"]["press"]["webhook"]["url"]
    )


async def test_unmanaged_objects_stay_without_prune(gateway: RunningGateway) -> None:
    (token,) = gateway.services.registry.current.tokens
    document = {"accounts": {"main": {}}, "tenants": {"shop": {"accounts": ["main"]}}}
    await gateway.call_admin("PUT", "/accounts/spare", json={"user_key": ACCOUNT_KEY})
    await gateway.put_tenant("press")
    applied = await apply_registry(gateway, document)
    assert applied["unmanaged"] == ["accounts.spare", "tenants.press", f"tenants.shop.tokens.{token}"]
    assert (await gateway.call("GET", "/v1/quota")).status_code == 200
    applied = await apply_registry(gateway, document, "?prune=true")
    assert [difference["path"] for difference in applied["differences"]] == [
        "accounts.spare",
        "tenants.press",
        "tenants.shop.tokens",
    ]
    expect_problem(await gateway.call("GET", "/v1/quota"), 401, "unauthenticated")
    current = gateway.services.registry.current
    assert (list(current.accounts), list(current.tenants), list(current.tokens)) == (["main"], ["shop"], [])


async def test_objects_with_running_tasks_need_force(gateway: RunningGateway) -> None:
    await gateway.upstream.keep_running()
    task = (await gateway.submit()).json()
    for query in ("?prune=true", "?prune=true&dry_run=true"):
        response = await gateway.call_admin("PUT", f"/registry{query}", json={})
        expect_problem(response, 409, "conflict")
        assert "1 submissions of accounts.main have not ended; 1 tasks of tenants.shop are active" in response.text
    assert "shop" in gateway.services.registry.current.tenants
    assert (await gateway.call("GET", task["links"]["self"])).status_code == 200
    await apply_registry(gateway, {}, "?prune=true&force=true")
    assert gateway.services.registry.current.tenants == {}


async def test_empty_document_needs_force(gateway: RunningGateway) -> None:
    before = gateway.services.registry.current
    for query in ("?prune=true", "?prune=true&dry_run=true"):
        response = await gateway.call_admin("PUT", f"/registry{query}", json={"accounts": {}})
        expect_problem(response, 409, "conflict")
        assert "Nothing would be left" in response.text
    assert gateway.services.registry.current is before
    await apply_registry(gateway, {}, "?prune=true&force=true")
    assert gateway.services.registry.current.accounts == {}
    assert (await apply_registry(gateway, {}, "?prune=true"))["differences"] == []


@pytest.mark.parametrize("tag", ['"1"', 'W/"3"', "3", '"x"', '"1", "2"'])
async def test_outdated_version_is_refused(gateway: RunningGateway, tag: str) -> None:
    before = gateway.services.registry.current
    response = await put_registry(gateway, FULL_REGISTRY, tag)
    expect_problem(response, 412, "outdated")
    assert gateway.services.registry.current is before


async def test_current_version_is_applied(gateway: RunningGateway) -> None:
    tag = (await get_registry(gateway)).headers["etag"]
    response = await put_registry(gateway, FULL_REGISTRY, f'"0", {tag}')
    assert response.status_code == 200
    assert response.headers["etag"] == (await get_registry(gateway)).headers["etag"] != tag
    assert (await put_registry(gateway, FULL_REGISTRY, "*")).status_code == 200


async def test_concurrent_write_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_fake_gateway() as (gateway, _, _):
        store: Any = gateway.services.registry
        write = store.write

        async def forestalled(change: Any) -> bool:
            monkeypatch.undo()
            await write(type(change)(version=change.version, next_id=change.next_id))
            return bool(await write(change))

        monkeypatch.setattr(store, "write", forestalled)
        response = await gateway.call_admin("PUT", "/registry", json=FULL_REGISTRY)
        expect_problem(response, 412, "outdated")
        assert list(gateway.services.registry.current.accounts) == ["main"]


async def test_one_error_rejects_the_document(gateway: RunningGateway) -> None:
    before = gateway.services.registry.current
    document: dict[str, Any] = {
        "accounts": {"new": {}, "main": {"floor_money": 0.001, "user_key": {"value": "with blanks"}}},
        "tenants": {"shop": {"accounts": ["main"], "limits": [{"window": "day"}]}, "fine": {"accounts": ["main"]}},
    }
    response = await gateway.call_admin("PUT", "/registry", json=document)
    expect_problem(response, 422, "invalid-options")
    assert [error["field"] for error in response.json()["errors"]] == [
        "accounts.main.user_key",
        "accounts.main.floor_money",
        "tenants.shop.limits[0]",
    ]
    assert "with blanks" not in response.text
    document |= {"accounts": {"new": {}}, "tenants": {"shop": {"accounts": ["mian"]}}}
    response = await gateway.call_admin("PUT", "/registry", json=document)
    assert [error["field"] for error in response.json()["errors"]] == [
        "accounts.new.user_key",
        "tenants.shop.accounts[0]",
    ]
    expect_problem(
        await gateway.call_admin("PUT", "/registry", json={"accounts": {"main": {"x": 1}}}), 422, "invalid-options"
    )
    expect_problem(await gateway.call_admin("PUT", "/registry?prune=maybe", json={}), 422, "invalid-options")
    expect_problem(await gateway.call_admin("PUT", "/registry", content=b"{"), 400, "malformed-request")
    assert gateway.services.registry.current is before


async def test_generated_secret_is_shown_once(gateway: RunningGateway) -> None:
    document: dict[str, Any] = {
        "tenants": {"shop": {"accounts": ["main"], "webhook": {"url": "https://hooks.example"}}}
    }
    applied = await apply_registry(gateway, document)
    assert applied["generated_secrets"]["shop"].startswith("whsec_")
    document["tenants"]["shop"]["max_active"] = 3
    assert (await apply_registry(gateway, document))["generated_secrets"] == {}


async def test_secret_reference_survives_while_the_secret_does(gateway: RunningGateway) -> None:
    await apply_registry(gateway, FULL_REGISTRY)
    await gateway.call_admin("PUT", "/accounts/main", json={"floor_count": 1})
    await gateway.put_tenant(webhook={"url": "https://hooks.example/a"})
    document = (await get_registry(gateway)).json()
    assert document["accounts"]["main"]["user_key"] == {"env": "MAIN_KEY"}
    assert document["tenants"]["shop"]["webhook"]["secret"] == {"env": "HOOK"}
    await gateway.call_admin("PUT", "/accounts/main", json={"user_key": "of-a-command"})
    await gateway.call_admin("POST", "/tenants/shop/webhook-secret")
    document = (await get_registry(gateway)).json()
    assert "user_key" not in document["accounts"]["main"]
    assert "secret" not in document["tenants"]["shop"]["webhook"]


async def test_changed_key_reopens_the_account(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(count=1, money=0)
    await gateway.wait_for_task((await gateway.submit()).json()["id"])
    state_before = (await gateway.call_admin("GET", "/accounts/main")).json()["state"]
    await apply_registry(
        gateway, {"accounts": {"main": {"user_key": {"value": USER_KEY}, "max_price": {"upscale": 1}}}}
    )
    assert (await gateway.call_admin("GET", "/accounts/main")).json()["state"] == state_before == "exhausted"
    await apply_registry(gateway, {"accounts": {"main": {"user_key": {"value": ACCOUNT_KEY}}}})
    assert (await gateway.call_admin("GET", "/accounts/main")).json()["state"] == "open"


async def test_changes_are_logged_without_secrets(gateway: RunningGateway) -> None:
    with structlog.testing.capture_logs() as logged:
        responses = [
            await gateway.call_admin("PUT", "/registry", json=FULL_REGISTRY),
            await gateway.call_admin("PUT", "/registry?dry_run=true&prune=true&force=true", json={}),
            await gateway.call_admin(
                "PUT", "/registry", json={"accounts": {"main": {"user_key": {"value": [ACCOUNT_KEY]}}}}
            ),
            await gateway.call_admin("PUT", "/registry?prune=true&force=true", json={}),
            await get_registry(gateway),
        ]
    assert [response.status_code for response in responses] == [200, 200, 422, 200, 200]
    events = [item for item in logged if not item["event"].startswith("request")]
    assert [
        (event["event"].partition(".")[0], event.get("account") or event.get("tenant") or event["removed_tenants"])
        for event in events
    ] == [
        ("registry", []),
        ("account", "main"),
        ("account", "spare"),
        ("tenant", "shop"),
        ("token", "shop"),
        ("registry", ["shop"]),
    ]
    assert events[1]["floor_count"] == 2
    assert events[3]["webhook"] == {"url": "https://hooks.example/a", "allow": ["10.0.0.0/8"]}
    assert events[3]["key_given"]
    for secret in (ACCOUNT_KEY, HOOK_SECRET, USER_KEY, gateway.token):
        assert secret not in repr(logged)
        assert not any(secret in response.text for response in responses)


def _account_id(gateway: RunningGateway, account: str) -> int:
    return gateway.services.registry.current.accounts[account].id


def _without_secrets(value: Any) -> Any:
    """Remove secrets, and creation times that the request omitted."""
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items() if key not in {"value", "created_at"}}
    return value
