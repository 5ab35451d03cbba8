"""Strategies for registry documents."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from hypothesis import strategies as st
from msgspec.structs import replace

from service.api.admin_schemas import (
    AccountEntry,
    Limit,
    RegistryBody,
    SecretEntry,
    TenantEntry,
    TokenEntry,
    WebhookEntry,
)
from service.crypto import Keyring
from service.domain.tasks import Kind
from service.domain.tenants import Registry, SpendingMode, TenantStatus, Window
from service.usecases.registry_plan import RegistryPlan, RegistryPlanner

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
USER_KEYS, WEBHOOK_SECRETS = (Keyring([b"r" * 32]).derive(name) for name in ("user-key", "webhook-secret"))

KEY_VARIABLES = {"KEY_ONE": "key-one", "KEY_TWO": "key-two"}
WEBHOOK_VARIABLES = {"HOOK_ONE": "whsec_" + "a" * 40, "HOOK_TWO": "whsec_" + "b" * 40}
ENVIRONMENT = KEY_VARIABLES | WEBHOOK_VARIABLES
"""The variables that documents refer to."""

ACCOUNTS, TENANTS = ("main", "with.dots"), ("shop", "press", "x.y")

_counts = st.integers(0, 10**12)
_yuan = st.integers(0, 10**12).map(lambda fen: fen / 100)
_labels = st.text(st.characters(codec="utf-8"), max_size=20)
_past_dates = st.datetimes(datetime(1980, 1, 1), datetime(2020, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - bounds have none
_future_dates = st.datetimes(datetime(2030, 1, 1), datetime(2090, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - as above

NOT_EXPIRED = st.none() | _future_dates
ANY_EXPIRY = NOT_EXPIRED | _past_dates


def plan_document(registry: Registry, body: RegistryBody, *, prune: bool = False) -> RegistryPlan:
    planner = RegistryPlanner(registry, NOW, user_key_cipher=USER_KEYS, webhook_cipher=WEBHOOK_SECRETS)
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
