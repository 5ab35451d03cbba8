"""Tenants, accounts, tokens and webhooks, as the registry holds them."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

from service.domain.hosts import (
    WEB_PORTS,
    Destination,
    IpAddress,
    allows_address,
    allows_url,
    parse_destination,
    url_address,
)
from service.domain.tasks import Kind

NAME_RULE = "be up to 63 lower-case letters, digits, dots, dashes and underscores, a letter or digit first"

Name = Annotated[
    str,
    Meta(pattern=r"\A[a-z0-9][a-z0-9._-]{0,62}\Z", description="A name of your choice.", extra={"must": NAME_RULE}),
]

TOKEN_PREFIX = "igw_"  # noqa: S105 - a public prefix by which scanners recognise a leaked token
_TOKEN_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # noqa: S105 - an alphabet
_TOKEN_SECRET_CHARS = 32
_TOKEN_CHECKSUM_CHARS = 6

MAX_DISABLED_URLS = 100
"""The latest disabled URLs of a tenant that are remembered."""


class SecretRef(Struct, frozen=True, omit_defaults=True):
    """The operator's source of a secret. The gateway never reads it, only exports it again."""

    env: str | None = None
    file: str | None = None


class WebhookSecrets(Struct, frozen=True):
    """Encrypted signing secrets; the previous one signs too until `previous_expires_at` (seconds since the epoch)."""

    current: bytes
    previous: bytes | None = None
    previous_expires_at: float = 0.0
    secret_ref: SecretRef | None = None

    def active_secrets(self, now: float) -> tuple[bytes, ...]:
        """Return the encrypted secrets that sign at `now`, the newest first."""
        return (self.current, self.previous) if self.previous and now < self.previous_expires_at else (self.current,)


class Webhook(Struct, frozen=True):
    """A tenant's webhook: events go to `url`, or where a task asks for it at a destination of `allow`.

    Without a `url` nothing is sent; the secrets are kept. `disabled_urls` answered 410.
    """

    url: str | None = None
    allow: tuple[str, ...] = ()
    secrets: WebhookSecrets | None = None
    disabled_urls: tuple[str, ...] = ()

    def allows_url(self, url: str) -> bool:
        """Whether a task may name a URL: its host and port are those of `url`, or listed in `allow`."""
        if self.url is None:
            return False
        own_host, own_port = url_address(self.url)
        own = Destination(own_host, None if own_port in WEB_PORTS else own_port)
        return allows_url((own, *self.destinations()), url)

    def allows_address(self, ip: IpAddress, port: int) -> bool:
        """Whether webhooks may go to an address that is not public: only a network of `allow` permits it."""
        return allows_address(self.destinations(), ip, port)

    def destinations(self) -> list[Destination]:
        return _parse_destinations(self.allow)

    def with_secret(self, current: WebhookSecrets | None, new_secret: bytes | None, generated_secret: bytes) -> Webhook:
        """Return a copy with the new secret, else the current one, else the generated one if it has a URL."""
        if new_secret is not None and (current is None or current.current != new_secret):
            current = WebhookSecrets(new_secret)
        elif current is None and self.url is not None:
            current = WebhookSecrets(generated_secret)
        return replace(self, secrets=current)

    def is_disabled(self, url: str) -> bool:
        return strip_query(url) in self.disabled_urls

    def with_disabled_url(self, url: str) -> Webhook:
        others = tuple(disabled for disabled in self.disabled_urls if disabled != strip_query(url))
        return replace(self, disabled_urls=(*others, strip_query(url))[-MAX_DISABLED_URLS:])


def _parse_destinations(entries: Sequence[str]) -> list[Destination]:
    return [destination for destination in map(parse_destination, entries) if destination]


def strip_query(url: str) -> str:
    """Return a URL as it may be logged and shown: queries tend to hold credentials."""
    return url.partition("?")[0]


class Window(StrEnum):
    """A calendar window in UTC; `total` never resets."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


class SpendingMode(StrEnum):
    """Whether a tenant may spend prepaid uses only, or money too."""

    COUNT_ONLY = "count_only"
    COUNT_THEN_MONEY = "count_then_money"


class TenantStatus(StrEnum):
    ACTIVE = "active"
    READ_ONLY = "read-only"
    """Submissions are refused."""
    DISABLED = "disabled"
    """All calls are refused."""


class Limit(Struct, frozen=True, omit_defaults=True):
    """A limit in one window; None means unlimited. `warn_at` are percentages of it that are reported, in order."""

    window: Window
    tasks: int | None = None
    money_fen: int | None = None
    warn_at: tuple[int, ...] = ()


class TenantPolicy(Struct, frozen=True):
    limits: tuple[Limit, ...] = ()
    max_active: int | None = None
    spending_mode: SpendingMode = SpendingMode.COUNT_THEN_MONEY


class Tenant(Struct, frozen=True):
    """A service that submits tasks. Ids are never reused, names can be; accounts are tried in order."""

    id: int
    name: str
    accounts: tuple[str, ...]
    policy: TenantPolicy = TenantPolicy()
    kinds: tuple[Kind, ...] | None = None
    state: TenantStatus = TenantStatus.ACTIVE
    webhook: Webhook = Webhook()
    note: str = ""
    allow_image_url: tuple[str, ...] = ()
    """Destinations from which images are fetched; none by default."""

    def can_submit(self, kind: Kind) -> bool:
        return self.kinds is None or kind in self.kinds

    def image_destinations(self) -> list[Destination]:
        return _parse_destinations(self.allow_image_url)


class AccountPolicy(Struct, frozen=True):
    """Floors of an account, and the maximum price per kind in fen."""

    floor_count: int = 0
    floor_money_fen: int = 0
    max_price: Mapping[Kind, int] = {}


class Account(Struct, frozen=True):
    """An account at an upstream: without `base_url`, at the default one. Its key is encrypted for its id and origin."""

    id: int
    name: str
    user_key: bytes
    base_url: str | None = None
    policy: AccountPolicy = AccountPolicy()
    secret_ref: SecretRef | None = None
    note: str = ""


class Token(Struct, frozen=True):
    """A bearer token of a tenant, of which only the hash is stored; times in seconds since the epoch."""

    id: str
    tenant: int
    digest: bytes
    label: str | None
    created_at: float
    expires_at: float | None = None

    def is_valid_at(self, now: float) -> bool:
        return self.expires_at is None or now < self.expires_at


class OperatorRole(StrEnum):
    """What an operator may do: make changes, or only read."""

    ADMIN = "admin"
    READ_ONLY = "read-only"


class Operator(Struct, frozen=True):
    """A token of an operator, whose name is the actor of the changes made with it."""

    name: str
    role: OperatorRole
    digest: bytes


def generate_token() -> str:
    """Generate a token: a recognisable prefix, 190 random bits and a checksum."""
    secret = "".join(secrets.choice(_TOKEN_ALPHABET) for _ in range(_TOKEN_SECRET_CHARS))
    return f"{TOKEN_PREFIX}{secret}{_token_checksum(secret)}"


def has_valid_checksum(token: str) -> bool:
    """Whether prefix and checksum match, which needs no lookup."""
    body = token.removeprefix(TOKEN_PREFIX)
    secret, check = body[:_TOKEN_SECRET_CHARS], body[_TOKEN_SECRET_CHARS:]
    if body == token or len(body) != _TOKEN_SECRET_CHARS + _TOKEN_CHECKSUM_CHARS or not body.isascii():
        return False
    return hmac.compare_digest(check, _token_checksum(secret))


def hash_token(token: str) -> bytes:
    """Hash a token for storage. It has enough entropy to need no salt."""
    return hashlib.sha256(token.encode()).digest()


def _token_checksum(secret: str) -> str:
    number, digits = zlib.crc32(secret.encode()), ""
    for _ in range(_TOKEN_CHECKSUM_CHARS):
        number, digit = divmod(number, len(_TOKEN_ALPHABET))
        digits = _TOKEN_ALPHABET[digit] + digits
    return digits


class Registry(Struct, eq=False, dict=True):
    """One immutable version of accounts, tenants and tokens, indexed for requests."""

    version: int = 0
    next_id: int = 1
    tenants: Mapping[str, Tenant] = {}
    accounts: Mapping[str, Account] = {}
    tokens: Mapping[str, Token] = {}
    deleted_tenant_names: Mapping[int, str] = {}

    def __post_init__(self) -> None:
        self._tenants_by_id = {tenant.id: tenant for tenant in self.tenants.values()}
        self._accounts_by_id = {account.id: account for account in self.accounts.values()}
        self._tokens_by_digest = {token.digest: token for token in self.tokens.values()}
        self._tokens_by_tenant: dict[int, list[Token]] = {}
        for token in self.tokens.values():
            self._tokens_by_tenant.setdefault(token.tenant, []).append(token)

    def tenant_by_token(self, digest: bytes) -> tuple[Tenant, Token] | None:
        """Find a token by its hash, expired ones too."""
        token = self._tokens_by_digest.get(digest)
        tenant = self._tenants_by_id.get(token.tenant) if token else None
        return (tenant, token) if tenant and token else None

    def tenant_by_id(self, tenant_id: int) -> Tenant | None:
        return self._tenants_by_id.get(tenant_id)

    def tenant_name(self, tenant_id: int) -> str | None:
        """Return the name of a tenant, also of a deleted one; None if it never existed."""
        tenant = self.tenant_by_id(tenant_id)
        return tenant.name if tenant else self.deleted_tenant_names.get(tenant_id)

    def account_by_id(self, account_id: int) -> Account | None:
        return self._accounts_by_id.get(account_id)

    def account_name(self, account_id: int) -> str | None:
        """Return the name of an account; None if it was deleted."""
        account = self.account_by_id(account_id)
        return account.name if account else None

    def accounts_of(self, tenant: Tenant) -> tuple[Account, ...]:
        """Return the accounts of a tenant in order, without deleted ones."""
        return tuple(self.accounts[name] for name in tenant.accounts if name in self.accounts)

    def limit_warnings(self, tenant: Tenant) -> Iterator[str]:
        """Yield what is questionable about the limits of a tenant."""
        limits = tenant.policy.limits
        may_spend = tenant.policy.spending_mode is SpendingMode.COUNT_THEN_MONEY
        if may_spend and any(limit.money_fen is not None for limit in limits):
            for account in self.accounts_of(tenant):
                missing = [kind for kind in Kind if tenant.can_submit(kind) and kind not in account.policy.max_price]
                if missing:
                    yield (
                        f"have money, but account {account.name} has no max_price of {', '.join(missing)}: while no "
                        "price of a kind is known, one task holds the rest of the limit"
                    )
        if tenant.webhook.url is None and any(limit.warn_at for limit in limits):
            yield "have warn_at, but the tenant has no webhook: only a metric and an alert tell of it"

    def tokens_of(self, tenant: Tenant) -> tuple[Token, ...]:
        """Return the tokens of a tenant, oldest first."""
        tokens = self._tokens_by_tenant.get(tenant.id, ())
        return tuple(sorted(tokens, key=lambda token: (token.created_at, token.id)))
