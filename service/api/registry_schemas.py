"""JSON of the whole registry, in the operators' API and in files."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from msgspec import Meta, Struct, field
from msgspec.structs import asdict, replace

from service.api.admin_schemas import (
    AccountSpec,
    TenantSpec,
    WebhookSpec,
    account_spec,
    seconds_to_datetime,
    tenant_spec,
    to_seconds,
    token_expires_at,
)
from service.domain import tenants
from service.domain.errors import ErrorCollector, field_path
from service.domain.tenants import Name, Registry, SecretRef
from service.usecases.registry_plan import DesiredAccount, DesiredRegistry, DesiredTenant

_Id = Annotated[
    int,
    Meta(ge=1, le=2**53, description="Identifies it beyond its name: tasks and usage refer to it. Do not change it."),
]
_TokenId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{12}\Z", extra={"must": "be 12 hexadecimal digits in lower case"})]
_Hash = Annotated[
    str,
    Meta(
        pattern=r"\A[0-9a-f]{64}\Z",
        description="SHA-256 of the token, in hexadecimal digits.",
        extra={"must": "be 64 hexadecimal digits in lower case"},
    ),
]
_Timestamp = Annotated[datetime, Meta(tz=True)]
_SecretLocation = Annotated[str, Meta(min_length=1, max_length=4_096)]


class SecretEntry(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The source of a secret. The gateway stores the source, and reads the secret only from `value`."""

    env: Annotated[
        _SecretLocation | None, Meta(description="An environment variable where the registry is applied.")
    ] = None
    file: Annotated[_SecretLocation | None, Meta(description="A file where the registry is applied.")] = None
    value: (
        Annotated[
            str, Meta(max_length=512, description="The secret; the present one is kept without it. Never returned.")
        ]
        | None
    ) = None

    def to_secret_ref(self) -> SecretRef | None:
        return SecretRef(self.env, self.file) if self.env or self.file else None


class AccountEntry(AccountSpec, frozen=True, omit_defaults=True):
    """An account at the upstream. Omitted fields get their defaults, except the id and the key."""

    id: _Id | None = None
    user_key: SecretEntry | None = None

    def to_desired(self, name: str) -> DesiredAccount:
        entry = self.user_key or SecretEntry()
        desired = self._to_desired(name, entry.value)
        account = replace(desired.account, id=self.id or 0, secret_ref=entry.to_secret_ref())
        return replace(desired, account=account)


class TokenEntry(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A token by its hash."""

    sha256: _Hash
    label: Annotated[str, Meta(max_length=200, description="Its purpose.")] | None = None
    created_at: _Timestamp | None = None
    expires_at: _Timestamp | None = None

    def to_token(self, token_id: str, errors: ErrorCollector) -> tenants.Token:
        """Return the token without the id of its tenant."""
        path = field_path("tokens", token_id)
        created = errors.collect(path, None, to_seconds, "created_at", self.created_at) or 0
        expires = errors.collect(path, None, to_seconds, "expires_at", self.expires_at)
        return tenants.Token(token_id, 0, bytes.fromhex(self.sha256), self.label, created, expires)


class WebhookEntry(WebhookSpec, frozen=True, omit_defaults=True):
    """Webhook of a tenant."""

    secret: SecretEntry | None = None


class TenantEntry(TenantSpec, frozen=True, kw_only=True, omit_defaults=True):
    """A tenant and its tokens. Omitted fields get their defaults, except the id and the secret."""

    id: _Id | None = None
    webhook: WebhookEntry | None = None
    tokens: Annotated[dict[_TokenId, TokenEntry], Meta(description="By their ids.")] = field(default_factory=dict)

    def to_desired(self, name: str) -> DesiredTenant:
        """Raises InvalidOptions with all errors."""
        errors = ErrorCollector()
        entry = self.webhook.secret if self.webhook and self.webhook.secret else SecretEntry()
        desired = self._to_desired(name, entry.value, errors)
        tokens = tuple(token.to_token(token_id, errors) for token_id, token in self.tokens.items())
        errors.raise_if_any()
        tenant = replace(desired.tenant, id=self.id or 0)
        return replace(desired, tenant=tenant, tokens=tokens, secret_ref=entry.to_secret_ref())


class RegistryBody(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The whole registry without its history: accounts and tenants by name."""

    accounts: dict[Name, AccountEntry] = {}
    tenants: dict[Name, TenantEntry] = {}

    def to_desired(self, *, prune: bool) -> DesiredRegistry:
        """Return the desired registry. Raises InvalidOptions with all errors."""
        errors = ErrorCollector()
        desired_accounts = [
            errors.collect(field_path("accounts", name), None, entry.to_desired, name)
            for name, entry in self.accounts.items()
        ]
        desired_tenants = [
            errors.collect(field_path("tenants", name), None, entry.to_desired, name)
            for name, entry in self.tenants.items()
        ]
        errors.raise_if_any()
        return DesiredRegistry(tuple(filter(None, desired_accounts)), tuple(filter(None, desired_tenants)), prune)


class DifferenceKind(StrEnum):
    """Kind of a difference."""

    ADDED = "added"
    CHANGED = "changed"
    REMOVED = "removed"


class Difference(Struct, frozen=True, omit_defaults=True):
    """A difference at one path. Secrets are not shown."""

    path: Annotated[str, Meta(examples=["tenants.shop.max_active"])]
    action: DifferenceKind
    before: Annotated[Any, Meta(description="Absent if it is added.")] = None
    after: Annotated[Any, Meta(description="Absent if it is removed.")] = None


class ApplyResult(Struct, frozen=True):
    """Result of applying a registry, or of a dry run."""

    applied: Annotated[bool, Meta(description="False for a dry run, and if nothing changes.")]
    differences: list[Difference]
    unmanaged: Annotated[list[str], Meta(description="Present, but not in the request: `prune` removes it.")]
    generated_secrets: Annotated[
        dict[str, str], Meta(description="Generated webhook secrets by tenant, shown only once.")
    ]
    warnings: Annotated[list[str], Meta(description="Questionable settings of tenants.")]


class ReencryptResult(Struct, frozen=True):
    """Secrets that were encrypted again with the first of the secret keys."""

    accounts: Annotated[list[str], Meta(description="Accounts whose keys were encrypted again.")]
    tenants: Annotated[list[str], Meta(description="Tenants whose webhook secrets were encrypted again.")]
    undecryptable: Annotated[
        list[str], Meta(description="Unchanged, as no secret key decrypts them.", examples=[["accounts.main.user_key"]])
    ]


def render_registry(registry: Registry, now: float) -> RegistryBody:
    """Render the registry by name, without tokens that have expired at `now` (seconds since the epoch)."""
    tokens = defaultdict[int, dict[str, TokenEntry]](dict)
    for token in sorted(registry.tokens.values(), key=lambda token: (token.created_at, token.id)):
        if token.is_valid_at(now):
            created_at, expires_at = seconds_to_datetime(token.created_at), token_expires_at(token)
            tokens[token.tenant][token.id] = TokenEntry(token.digest.hex(), token.label, created_at, expires_at)
    return RegistryBody(
        {name: _account_entry(account) for name, account in sorted(registry.accounts.items())},
        {name: _tenant_entry(tenant, tokens[tenant.id]) for name, tenant in sorted(registry.tenants.items())},
    )


def _account_entry(account: tenants.Account) -> AccountEntry:
    return AccountEntry(**asdict(account_spec(account)), id=account.id, user_key=_secret_entry(account.secret_ref))


def _tenant_entry(tenant: tenants.Tenant, tokens: dict[str, TokenEntry]) -> TenantEntry:
    fields, secrets = asdict(tenant_spec(tenant)), tenant.webhook.secrets
    if webhook := fields["webhook"]:
        secret = _secret_entry(secrets.secret_ref) if secrets else None
        fields["webhook"] = WebhookEntry(webhook.url, webhook.allow, secret)
    return TenantEntry(**fields, id=tenant.id, tokens=tokens)


def _secret_entry(ref: SecretRef | None) -> SecretEntry | None:
    return SecretEntry(ref.env, ref.file) if ref else None
