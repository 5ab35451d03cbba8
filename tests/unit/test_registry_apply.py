"""Planning of registry changes."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from service.api.admin import diff_registry
from service.api.admin_schemas import (
    AccountEntry,
    RegistryBody,
    SecretEntry,
    TenantEntry,
    TokenEntry,
    WebhookEntry,
    render_registry,
)
from service.domain.errors import InvalidOptions
from service.domain.tenants import Registry
from tests.unit.registry_strategies import (
    ANY_EXPIRY,
    NOW,
    USER_KEYS,
    plan_document,
    registry_documents,
    without_secrets,
)

KEY = SecretEntry(value="a-key")


def plan_errors(registry: Registry, body: RegistryBody, *, prune: bool = False) -> dict[str, str]:
    with pytest.raises(InvalidOptions) as raised:
        plan_document(registry, body, prune=prune)
    return {error.field: error.detail for error in raised.value.errors}


def make_registry(**tenants: TenantEntry) -> Registry:
    return plan_document(Registry(), RegistryBody({"main": AccountEntry(id=7, user_key=KEY)}, tenants)).after


@given(registry_documents())
def test_applied_document_reads_back(body: RegistryBody) -> None:
    assert render_registry(plan_document(Registry(), body).after, NOW) == without_secrets(body)


@given(registry_documents(expiries=ANY_EXPIRY), st.booleans())
def test_own_document_changes_nothing(body: RegistryBody, prune: bool) -> None:
    registry = plan_document(Registry(), body).after
    plan = plan_document(registry, render_registry(registry, NOW), prune=prune)
    assert (plan.change, diff_registry(plan, NOW), plan.unmanaged) == (None, [], ())


@given(registry_documents(expiries=ANY_EXPIRY), registry_documents(expiries=ANY_EXPIRY), st.booleans())
def test_differences_match_the_changes(one: RegistryBody, other: RegistryBody, prune: bool) -> None:
    first = plan_document(Registry(), one).after
    plan = plan_document(first, other, prune=prune)
    assert (plan.change is None) == (diff_registry(plan, NOW) == [])
    again = plan_document(plan.after, other, prune=prune)
    assert (again.change, diff_registry(again, NOW), again.generated_secrets) == (None, [], {})
    document = render_registry(plan.after, NOW)
    unmanaged = [*(document.accounts.keys() - other.accounts), *(document.tenants.keys() - other.tenants)]
    assert not (prune and unmanaged)
    assert len([item for item in plan.unmanaged if ".tokens." not in item]) == len(unmanaged)
    for name, account in without_secrets(other).accounts.items():
        assert document.accounts[name] == account


@given(registry_documents(), registry_documents())
def test_ids_and_version_advance(one: RegistryBody, other: RegistryBody) -> None:
    plan = plan_document(plan_document(Registry(), one).after, other)
    accounts, tenants = plan.after.accounts.values(), plan.after.tenants.values()
    ids = {*(account.id for account in accounts), *(tenant.id for tenant in tenants)}
    assert len(ids) == len(accounts) + len(tenants)
    assert all(item < plan.after.next_id for item in ids)
    assert all(plan.after.tenants[name].id == tenant.id for name, tenant in plan.before.tenants.items())


def test_new_ids_are_unique() -> None:
    later = int(NOW * 1000) + 50
    body = RegistryBody(
        {"main": AccountEntry(id=later, user_key=KEY), "new": AccountEntry(user_key=KEY)},
        {"one": TenantEntry(accounts=[]), "two": TenantEntry(accounts=[])},
    )
    after = plan_document(Registry(), body).after
    ids = [after.accounts["new"].id, after.tenants["one"].id, after.tenants["two"].id]
    assert ids == [later + 1, later + 2, later + 3]
    assert after.next_id == later + 4


def test_foreign_ids_are_refused() -> None:
    registry = make_registry(shop=TenantEntry(id=8, accounts=["main"]), gone=TenantEntry(id=9, accounts=[]))
    kept = RegistryBody({"main": AccountEntry()}, {"shop": TenantEntry(accounts=["main"])})
    registry = plan_document(registry, kept, prune=True).after
    assert registry.deleted_tenant_names == {9: "gone"}
    wrong = {
        "shop": 1,
        "store": 8,
        "till": 7,
        "other": 9,
        "future": int(NOW * 1000) + 200_000_000,
        "twin": 3,
        "twin-2": 3,
    }
    body = RegistryBody({}, {name: TenantEntry(id=number, accounts=[]) for name, number in wrong.items()})
    errors = plan_errors(registry, body)
    assert errors.keys() == {f"tenants.{name}.id" for name in wrong}
    assert "must be 8" in errors["tenants.shop.id"]
    assert "is the id of shop" in errors["tenants.store.id"]
    assert "is the id of main" in errors["tenants.till.id"]
    assert "was the id of the tenant gone" in errors["tenants.other.id"]
    assert "no id that was ever given" in errors["tenants.future.id"]
    assert "more than once" in errors["tenants.twin.id"]
    again = plan_document(registry, RegistryBody({}, {"gone": TenantEntry(id=9, accounts=[])}))
    assert again.after.tenants["gone"].id == 9


def test_removed_tenants_id_is_not_reused() -> None:
    registry = make_registry(shop=TenantEntry(id=8, accounts=["main"]))
    body = RegistryBody({"main": AccountEntry()}, {"store": TenantEntry(id=8, accounts=["main"])})
    assert "A name can't be changed" in plan_errors(registry, body, prune=True)["tenants.store.id"]


def test_tenant_accounts_must_exist() -> None:
    shop = TenantEntry(accounts=["main", "mian"])
    assert plan_errors(make_registry(), RegistryBody({}, {"shop": shop})) == {
        "tenants.shop.accounts[1]": "there is no account mian: did you mean main?"
    }
    assert plan_errors(make_registry(), RegistryBody({}, {"shop": shop}), prune=True).keys() == {
        "tenants.shop.accounts[0]",
        "tenants.shop.accounts[1]",
    }


def test_account_keys_kept_and_changed() -> None:
    registry = make_registry()
    stored = registry.accounts["main"].user_key

    def with_key(key: SecretEntry | None) -> RegistryBody:
        return RegistryBody({"main": AccountEntry(user_key=key)})

    assert plan_document(registry, with_key(None)).change is None
    assert plan_document(registry, with_key(KEY)).change is None
    plan = plan_document(registry, with_key(SecretEntry(value="another-key")))
    assert [(item.path, item.before, item.after) for item in diff_registry(plan, NOW)] == [
        ("accounts.main.user_key.value", None, None)
    ]
    assert USER_KEYS.decrypt(plan.after.accounts["main"].user_key) == b"another-key"
    moved = plan_document(registry, with_key(SecretEntry(env="ELSEWHERE", value="a-key")))
    assert [item.path for item in diff_registry(moved, NOW)] == ["accounts.main.user_key"]
    assert moved.after.accounts["main"].user_key == stored


def test_missing_secrets_are_refused() -> None:
    webhook = WebhookEntry("https://hooks.example", secret=SecretEntry(env="HOOK"))
    body = RegistryBody(
        {"main": AccountEntry(user_key=SecretEntry(env="KEY"))}, {"shop": TenantEntry(accounts=[], webhook=webhook)}
    )
    assert plan_errors(Registry(), body).keys() == {"accounts.main.user_key", "tenants.shop.webhook.secret"}


def test_token_belongs_to_one_tenant() -> None:
    token = TokenEntry("a" * 64)
    registry = make_registry(shop=TenantEntry(id=8, accounts=[], tokens={"0" * 12: token}))
    stolen = RegistryBody({}, {"press": TenantEntry(accounts=[], tokens={"0" * 12: TokenEntry("b" * 64)})})
    assert plan_errors(registry, stolen) == {
        "tenants.press.tokens.000000000000": "has the id of another tenant's token"
    }
    copied = RegistryBody({}, {"press": TenantEntry(accounts=[], tokens={"1" * 12: token})})
    assert plan_errors(registry, copied).keys() == {
        "tenants.shop.tokens.000000000000.sha256",
        "tenants.press.tokens.111111111111.sha256",
    }


def test_disabled_url_stays_disabled() -> None:
    url = "https://hooks.example/"
    body = RegistryBody({}, {"shop": TenantEntry(accounts=[], webhook=WebhookEntry(url))})
    registry = plan_document(Registry(), body).after
    shop = registry.tenants["shop"]
    off = Registry(1, registry.next_id, {"shop": replace(shop, webhook=shop.webhook.with_disabled_url(url))})
    busy = {"shop": replace(body.tenants["shop"], max_active=3)}
    assert plan_document(off, RegistryBody({}, busy)).after.tenants["shop"].webhook.is_disabled(url)
    allowed = WebhookEntry(url, ["other.example"])
    other = RegistryBody({}, {"shop": TenantEntry(accounts=[], webhook=allowed)})
    assert not plan_document(off, other).after.tenants["shop"].webhook.is_disabled(url)


def test_expired_tokens() -> None:
    past, future = datetime(2020, 1, 1, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=UTC)

    def with_end(end: datetime | None) -> RegistryBody:
        return RegistryBody(
            {}, {"shop": TenantEntry(accounts=[], tokens={"0" * 12: TokenEntry("a" * 64, expires_at=end)})}
        )

    assert plan_document(make_registry(shop=TenantEntry(accounts=[])), with_end(past)).change is None
    registry = plan_document(make_registry(), with_end(future)).after
    ended = plan_document(registry, with_end(past))
    assert [(item.path, item.action) for item in diff_registry(ended, NOW)] == [("tenants.shop.tokens", "removed")]
    assert not ended.after.tokens["0" * 12].is_valid_at(NOW)
    assert plan_document(ended.after, RegistryBody({}, {"shop": TenantEntry(accounts=[])})).unmanaged == (
        "accounts.main",
    )
    assert plan_document(ended.after, with_end(None)).after.tokens["0" * 12].is_valid_at(NOW)


def test_webhook_secret_kept_and_changed() -> None:
    one, other = (SecretEntry(value=f"whsec_{letter * 40}") for letter in "ab")

    def with_secret(secret: SecretEntry | None) -> RegistryBody:
        hook = WebhookEntry("https://hooks.example/", secret=secret)
        return RegistryBody({}, {"shop": TenantEntry(accounts=[], webhook=hook)})

    registry = plan_document(Registry(), with_secret(one)).after
    assert plan_document(registry, with_secret(one)).change is None
    assert plan_document(registry, with_secret(None)).change is None
    plan = plan_document(registry, with_secret(other))
    assert [(item.path, item.action, item.before, item.after) for item in diff_registry(plan, NOW)] == [
        ("tenants.shop.webhook.secret.value", "changed", None, None)
    ]
    assert plan.after.tenants["shop"].webhook.secrets != registry.tenants["shop"].webhook.secrets
    assert plan.generated_secrets == {}
