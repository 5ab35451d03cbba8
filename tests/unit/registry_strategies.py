"""Strategies for registry documents."""

from __future__ import annotations

from collections.abc import Sequence
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


def _limits(windows: Sequence[Window]) -> st.SearchStrategy[list[Limit]]:
    limits: list[st.SearchStrategy[Limit]] = [
        st.builds(Limit, st.just(window), _counts, st.none() | _yuan) for window in windows
    ]
    return st.tuples(*limits).map(list)


@st.composite
def _account(draw: st.DrawFn, number: int) -> AccountEntry:
    return AccountEntry(
        id=number,
        user_key=draw(_secrets(KEY_VARIABLES)),
        base_url=draw(st.sampled_from([None, "https://upstream.example/v2"])),
        floor_count=draw(_counts),
        floor_money=draw(_yuan),
        max_price=draw(st.dictionaries(st.sampled_from(Kind), _yuan)),
    )


@st.composite
def _tokens(draw: st.DrawFn, owner: int, ends: st.SearchStrategy[Any]) -> dict[str, TokenEntry]:
    tokens = {}
    for number in draw(st.sets(st.integers(0, 3))):
        sha256 = f"{owner:x}{number:x}{draw(st.sampled_from('ab'))}".rjust(64, "0")
        tokens[f"{owner:x}{number:x}".rjust(12, "0")] = TokenEntry(
            sha256, draw(st.none() | _labels), draw(_past_dates), draw(ends)
        )
    return tokens


@st.composite
def _tenant(draw: st.DrawFn, number: int, accounts: Sequence[str], ends: st.SearchStrategy[Any]) -> TenantEntry:
    webhook = st.builds(
        WebhookEntry,
        st.sampled_from(["https://hooks.example/a?b=c", "https://hooks.example/d"]),
        st.sampled_from([[], ["other.example"], ["10.0.0.0/8", "other.example"]]),
        st.none() | _secrets(WEBHOOK_VARIABLES),
    )
    return TenantEntry(
        id=number,
        accounts=draw(st.lists(st.sampled_from(accounts), unique=True) if accounts else st.just([])),
        limits=draw(st.lists(st.sampled_from(Window), unique=True).flatmap(_limits)),
        max_active=draw(st.none() | _counts),
        spending_mode=draw(st.sampled_from(SpendingMode)),
        kinds=draw(st.none() | st.lists(st.sampled_from(Kind), unique=True)),
        webhook=draw(st.none() | webhook),
        note=draw(st.text(max_size=20)),
        state=draw(st.sampled_from(TenantStatus)),
        tokens=draw(_tokens(number, ends)),
    )


@st.composite
def registry_documents(draw: st.DrawFn, *, expiries: st.SearchStrategy[Any] = NOT_EXPIRED) -> RegistryBody:
    """Generate any registry; a name always has the same id."""
    accounts = {name: draw(_account(number)) for number, name in enumerate(ACCOUNTS, 1) if draw(st.booleans())}
    tenants = {
        name: draw(_tenant(number, list(accounts), expiries))
        for number, name in enumerate(TENANTS, len(ACCOUNTS) + 1)
        if draw(st.booleans())
    }
    return RegistryBody(accounts, tenants)
