"""Planning of registry changes, and the registry as a TOML file."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from service.api.admin_schemas import Limit
from service.api.registry import diff_registry
from service.api.registry_schemas import (
    AccountEntry,
    RegistryBody,
    SecretEntry,
    TenantEntry,
    TokenEntry,
    WebhookEntry,
    render_registry,
)
from service.cli.common import CommandError
from service.cli.registry import FILE_HEADER, format_registry_file, read_registry_file
from service.crypto import Keyring, UserKeyCipher
from service.domain.errors import InvalidOptions
from service.domain.tasks import Kind
from service.domain.tenants import Registry, SpendingMode, TenantStatus, Window
from service.usecases.registry_plan import RegistryPlan, RegistryPlanner

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
KEYRING = Keyring([b"r" * 32])
USER_KEYS, WEBHOOK_SECRETS = UserKeyCipher(KEYRING, "https://upstream.example"), KEYRING.derive("webhook-secret")

KEY_VARIABLES = {"KEY_ONE": "key-one", "KEY_TWO": "key-two"}
WEBHOOK_VARIABLES = {"HOOK_ONE": "whsec_" + "a" * 40, "HOOK_TWO": "whsec_" + "b" * 40}
ENVIRONMENT = KEY_VARIABLES | WEBHOOK_VARIABLES

ACCOUNTS, TENANTS = ("main", "with.dots"), ("shop", "press", "x.y")

_counts = st.integers(0, 10**12)
_yuan = st.integers(0, 10**12).map(lambda fen: fen / 100)
_labels = st.text(st.characters(codec="utf-8"), max_size=20)
_past_dates = st.datetimes(datetime(1980, 1, 1), datetime(2020, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - bounds have none
_future_dates = st.datetimes(datetime(2030, 1, 1), datetime(2090, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - as above

NOT_EXPIRED = st.none() | _future_dates
ANY_EXPIRY = NOT_EXPIRED | _past_dates


def plan_document(registry: Registry, body: RegistryBody, *, prune: bool = False) -> RegistryPlan:
    planner = RegistryPlanner(
        registry, NOW, user_key_cipher=USER_KEYS, webhook_cipher=WEBHOOK_SECRETS, base_url_error=lambda _: None
    )
    return planner.plan(body.to_desired(prune=prune))


def without_secrets(body: RegistryBody) -> RegistryBody:
    return RegistryBody(
        {name: replace(account, user_key=_without_value(account.user_key)) for name, account in body.accounts.items()},
        {
            name: replace(
                tenant, webhook=tenant.webhook and replace(tenant.webhook, secret=_without_value(tenant.webhook.secret))
            )
            for name, tenant in body.tenants.items()
        },
    )


def _without_value(entry: SecretEntry | None) -> SecretEntry | None:
    return entry and replace(entry, value=None)


def _secrets(choices: dict[str, str]) -> st.SearchStrategy[SecretEntry]:
    return st.sampled_from([SecretEntry(env=name, value=value) for name, value in choices.items()])


# Made once: strategies that are made for every example take most of the time.
_ACCOUNTS = st.builds(
    AccountEntry,
    user_key=_secrets(KEY_VARIABLES),
    base_url=st.sampled_from([None, "https://upstream.example/v2"]),
    floor_count=_counts,
    floor_money=_yuan,
    max_price=st.dictionaries(st.sampled_from(Kind), _yuan),
)
_WEBHOOKS = st.builds(
    WebhookEntry,
    st.sampled_from(["https://hooks.example/a?b=c", "https://hooks.example/d"]),
    st.sampled_from([[], ["other.example"], ["10.0.0.0/8", "other.example"]]),
    st.none() | _secrets(WEBHOOK_VARIABLES),
)
_TENANTS = st.builds(
    TenantEntry,
    accounts=st.lists(st.sampled_from(ACCOUNTS), unique=True),
    limits=st.lists(
        st.builds(Limit, st.sampled_from(Window), _counts, st.none() | _yuan), unique_by=lambda limit: limit.window
    ),
    max_active=st.none() | _counts,
    spending_mode=st.sampled_from(SpendingMode),
    kinds=st.none() | st.lists(st.sampled_from(Kind), unique=True),
    webhook=st.none() | _WEBHOOKS,
    allow_image_url=st.lists(st.sampled_from(["images.test", "10.0.0.0/8:81", "fd00::/8:8443"]), unique=True),
    note=st.text(max_size=20),
    state=st.sampled_from(TenantStatus),
)


def registry_documents(expiries: st.SearchStrategy[Any] = NOT_EXPIRED) -> st.SearchStrategy[RegistryBody]:
    """Generate any registry; a name always has the same id."""
    token = st.builds(TokenEntry, st.sampled_from("ab"), st.none() | _labels, _past_dates, expiries)
    tenants = st.tuples(_TENANTS, st.dictionaries(st.integers(0, 3), token))
    return st.builds(
        _build_document,
        st.fixed_dictionaries({}, optional=dict.fromkeys(ACCOUNTS, _ACCOUNTS)),
        st.fixed_dictionaries({}, optional=dict.fromkeys(TENANTS, tenants)),
    )


def _build_document(
    accounts: Mapping[str, AccountEntry], tenants: Mapping[str, tuple[TenantEntry, Mapping[int, TokenEntry]]]
) -> RegistryBody:
    return RegistryBody(
        {name: replace(account, id=ACCOUNTS.index(name) + 1) for name, account in accounts.items()},
        {
            name: replace(
                tenant,
                id=100 + TENANTS.index(name),
                accounts=[account for account in tenant.accounts if account in accounts],
                tokens={
                    f"{name.encode().hex()}{number}".rjust(12, "0"): replace(
                        token, sha256=f"{name.encode().hex()}{number}{token.sha256}".rjust(64, "0")
                    )
                    for number, token in tokens.items()
                },
            )
            for name, (tenant, tokens) in tenants.items()
        },
    )


KEY = SecretEntry(value="a-key")
HOOK_URL = "https://hooks.example/"


def plan_errors(registry: Registry, body: RegistryBody, *, prune: bool = False) -> list[str]:
    with pytest.raises(InvalidOptions) as raised:
        plan_document(registry, body, prune=prune)
    return [error.field for error in raised.value.errors]


def make_registry(**tenants: TenantEntry) -> Registry:
    return plan_document(Registry(), RegistryBody({"main": AccountEntry(id=7, user_key=KEY)}, tenants)).after


def changed_paths(plan: RegistryPlan) -> list[str]:
    differences = diff_registry(plan, NOW)
    assert not [item for item in differences if "secret.value" in item.path and (item.before or item.after)]
    return [item.path for item in differences]


@given(registry_documents(), registry_documents(expiries=ANY_EXPIRY), st.booleans())
def test_applied_document_reads_back(one: RegistryBody, other: RegistryBody, prune: bool) -> None:
    first = plan_document(Registry(), one).after
    assert render_registry(first, NOW) == without_secrets(one)
    plan = plan_document(first, other, prune=prune)
    assert (plan.change is None) == (diff_registry(plan, NOW) == [])
    again = plan_document(plan.after, other, prune=prune)
    assert (again.change, diff_registry(again, NOW), again.generated_secrets) == (None, [], {})
    document = render_registry(plan.after, NOW)
    own = plan_document(plan.after, document, prune=prune)
    assert (own.change, diff_registry(own, NOW), own.unmanaged) == (None, [], ())
    unmanaged = [*(document.accounts.keys() - other.accounts), *(document.tenants.keys() - other.tenants)]
    assert not (prune and unmanaged)
    assert len([item for item in plan.unmanaged if ".tokens." not in item]) == len(unmanaged)
    for name, account in without_secrets(other).accounts.items():
        assert document.accounts[name] == account
    # Ids are unique and never change.
    accounts, tenants = plan.after.accounts.values(), plan.after.tenants.values()
    ids = {*(account.id for account in accounts), *(tenant.id for tenant in tenants)}
    assert len(ids) == len(accounts) + len(tenants)
    assert all(number < plan.after.next_id for number in ids)
    kept = plan.before.tenants.keys() & plan.after.tenants.keys()
    assert all(plan.after.tenants[name].id == plan.before.tenants[name].id for name in kept)


def test_foreign_ids_are_refused() -> None:
    registry = make_registry(shop=TenantEntry(id=8, accounts=["main"]), gone=TenantEntry(id=9, accounts=[]))
    kept = RegistryBody({"main": AccountEntry()}, {"shop": TenantEntry(accounts=["main"])})
    registry = plan_document(registry, kept, prune=True).after
    future = int(NOW * 1000) + 200_000_000
    wrong = {"shop": 1, "store": 8, "till": 7, "other": 9, "future": future, "twin": 3, "twin-2": 3}
    body = RegistryBody({}, {name: TenantEntry(id=number, accounts=[]) for name, number in wrong.items()})
    assert plan_errors(registry, body) == [f"tenants.{name}.id" for name in wrong]
    again = plan_document(registry, RegistryBody({}, {"gone": TenantEntry(id=9, accounts=[])}))
    assert again.after.tenants["gone"].id == 9
    # Renaming a tenant removes it and adds another one, which must not get its tasks.
    renamed = RegistryBody({"main": AccountEntry()}, {"store": TenantEntry(id=8, accounts=["main"])})
    assert plan_errors(registry, renamed, prune=True) == ["tenants.store.id"]


def test_tenant_accounts_must_remain() -> None:
    body = RegistryBody({}, {"shop": TenantEntry(accounts=["main", "mian"])})
    paths = [f"tenants.shop.accounts[{place}]" for place in (0, 1)]
    assert (plan_errors(make_registry(), body), plan_errors(make_registry(), body, prune=True)) == (paths[1:], paths)


def test_changed_reference_of_a_secret() -> None:
    one = SecretEntry(value="whsec_" + "a" * 40)

    def make_document(secret: SecretEntry | None) -> RegistryBody:
        webhook = WebhookEntry(HOOK_URL, secret=secret)
        return RegistryBody(
            {"main": AccountEntry(user_key=secret)}, {"shop": TenantEntry(accounts=[], webhook=webhook)}
        )

    registry = plan_document(Registry(), make_document(one)).after
    assert plan_document(registry, make_document(None)).change is None
    moved = plan_document(registry, make_document(SecretEntry(env="ELSEWHERE", value=one.value)))
    paths = ["accounts.main.user_key", "tenants.shop.webhook.secret"]
    assert changed_paths(moved) == paths
    assert moved.after.accounts["main"].user_key == registry.accounts["main"].user_key
    assert plan_errors(Registry(), make_document(SecretEntry(env="ELSEWHERE"))) == paths


def test_token_belongs_to_one_tenant() -> None:
    token = TokenEntry("a" * 64)
    registry = make_registry(shop=TenantEntry(id=8, accounts=[], tokens={"0" * 12: token}))
    stolen = RegistryBody({}, {"press": TenantEntry(accounts=[], tokens={"0" * 12: TokenEntry("b" * 64)})})
    assert plan_errors(registry, stolen) == ["tenants.press.tokens.000000000000"]
    copied = RegistryBody({}, {"press": TenantEntry(accounts=[], tokens={"1" * 12: token})})
    assert plan_errors(registry, copied) == [
        "tenants.shop.tokens.000000000000.sha256",
        "tenants.press.tokens.111111111111.sha256",
    ]


def test_disabled_url_stays_disabled_until_the_webhook_changes() -> None:
    body = RegistryBody({}, {"shop": TenantEntry(accounts=[], webhook=WebhookEntry(HOOK_URL))})
    shop = plan_document(Registry(), body).after.tenants["shop"]
    registry = Registry(1, shop.id + 1, {"shop": replace(shop, webhook=shop.webhook.with_disabled_url(HOOK_URL))})
    for webhook, is_disabled in ((WebhookEntry(HOOK_URL), True), (WebhookEntry(HOOK_URL, ["other.example"]), False)):
        changed = RegistryBody({}, {"shop": TenantEntry(accounts=[], max_active=3, webhook=webhook)})
        assert plan_document(registry, changed).after.tenants["shop"].webhook.is_disabled(HOOK_URL) is is_disabled


def test_expired_tokens() -> None:
    def with_end(end: datetime | None) -> RegistryBody:
        tokens = {"0" * 12: TokenEntry("a" * 64, expires_at=end)}
        return RegistryBody({}, {"shop": TenantEntry(accounts=[], tokens=tokens)})

    past, future = datetime(2020, 1, 1, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=UTC)
    assert plan_document(make_registry(shop=TenantEntry(accounts=[])), with_end(past)).change is None
    ended = plan_document(plan_document(make_registry(), with_end(future)).after, with_end(past))
    assert changed_paths(ended) == ["tenants.shop.tokens"]
    assert not ended.after.tokens["0" * 12].is_valid_at(NOW)
    assert plan_document(ended.after, with_end(None)).after.tokens["0" * 12].is_valid_at(NOW)


def read_text(text: str) -> RegistryBody:
    with mock.patch.dict(os.environ, ENVIRONMENT):
        return read_registry_file(io.BytesIO(text.encode()))


def read_errors(text: str) -> list[str]:
    """Return the paths of the errors in a file, in any order, after checking that no secret is repeated."""
    with pytest.raises(CommandError) as raised:
        read_text(text)
    assert "sk-" not in raised.value.message
    _, *lines = raised.value.message.splitlines()
    return sorted(line.strip().partition(": ")[0] for line in lines)


@given(registry_documents(expiries=ANY_EXPIRY))
def test_file_reads_back(body: RegistryBody) -> None:
    text = format_registry_file(without_secrets(body))
    assert read_text(text) == body
    assert not any(secret in text for secret in ENVIRONMENT.values())


def test_former_names() -> None:
    shop = 'tenants.shop = {{ accounts = [], webhook = {{ url = "https://hooks.example/" }}, {} }}'
    former, current = 'purse = "count_only", disabled = true', 'spending_mode = "count_only", state = "read-only"'
    assert read_text(shop.format(former)) == read_text(shop.format(current)) != RegistryBody()
    assert read_text("") == RegistryBody()


def test_all_errors_are_reported() -> None:
    errors = read_errors(
        """
        [accounts.main]
        user_key = { env = "NOBODY_SET_IT" }
        max_price = { upscal = 1, vectorize = "1" }
        floor_cuont = 3
        [accounts.Loud]
        [accounts.spare]
        user_key = { env = "A", file = "b" }
        [tenants."with.dots"]
        accounts = ["main", "main"]
        limits = [{ window = "day", tasks = -1 }, { window = "fortnight", money = 1 }]
        [tenants.shop]
        webhook = { url = "x", allow = ["-"], secret = { env = "KEY_ONE" } }
        purse = "count_only"
        spending_mode = "count_only"
        [tenants.shop.tokens]
        short = { sha256 = "ff" }
        0123456789ab = { sha256 = "g", expires_at = 2027-01-01T00:00:00 }
        [tenant.x]
        """
    )
    dots, shop = 'tenants."with.dots"', "tenants.shop"
    assert errors == sorted(
        [
            *(f"accounts.main.{name}" for name in ("user_key", "floor_cuont")),
            *(f"accounts.main.max_price.{name}" for name in ("upscal", "vectorize")),
            *("accounts.Loud", "accounts.spare.user_key", "tenant"),
            *(f"{dots}.{name}" for name in ("accounts", "limits[0].tasks", "limits[1].window")),
            *(f"{shop}.{name}" for name in ("accounts", "purse", "tokens.short", "tokens.short.sha256")),
            *(f"{shop}.webhook.{name}" for name in ("url", "allow[0]", "secret")),
            *(f"{shop}.tokens.0123456789ab.{name}" for name in ("sha256", "expires_at")),
        ]
    )
    assert read_errors("accounts = 3\ntenants.shop = 'x'") == ["accounts", "tenants.shop"]


@pytest.mark.parametrize(
    "secret",
    ['"sk-0123456789"', '{ value = "sk-0123456789" }', '{ env = "sk-0123456789", value = "" }', '["sk-0123456789"]'],
)
def test_inline_secrets_are_refused(secret: str) -> None:
    webhook = f'{{ url = "{HOOK_URL}", secret = {secret} }}'
    text = f"accounts.main.user_key = {secret}\ntenants.shop = {{ accounts = [], webhook = {webhook} }}"
    assert read_errors(text) == ["accounts.main.user_key", "tenants.shop.webhook.secret"]


@pytest.mark.parametrize(
    ("entry", "path"),
    [
        *(('{ env = "" }', ".env"), ('{ envv = "X" }', ".envv")),
        *((entry, "") for entry in ('{ file = "/dev/null" }', '{ file = "BINARY" }', '{ env = "BLANKS" }')),
    ],
)
def test_missing_secret_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entry: str, path: str) -> None:
    monkeypatch.setenv("BLANKS", "sk- 0123")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    text = f"accounts.main.user_key = {entry.replace('BINARY', str(tmp_path / 'binary'))}"
    assert read_errors(text) == [f"accounts.main.user_key{path}"]


def test_head_of_the_file_lists_secrets_without_a_reference() -> None:
    accounts = {"main": AccountEntry(), "spare": AccountEntry(user_key=SecretEntry(env="KEY_ONE"))}
    tenants = {"with.dots": TenantEntry(accounts=[], webhook=WebhookEntry(HOOK_URL))}
    text = format_registry_file(RegistryBody(accounts, tenants)).removeprefix(FILE_HEADER)
    listed = [line for line in text.splitlines() if line.startswith("#   ")]
    assert listed == ["#   accounts.main.user_key", '#   tenants."with.dots".webhook.secret']
