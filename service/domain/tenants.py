"""Tenants, accounts, tokens and webhooks, as the registry holds them."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import zlib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Annotated
from urllib.parse import urlsplit

from msgspec import Meta, Struct
from msgspec.structs import replace

from service.domain.tasks import Kind


class SecretRef(Struct, frozen=True, omit_defaults=True):
    """Where whoever applies the registry finds a secret: in a variable of the environment, or in a file.

    The gateway never looks there: it only remembers, so that the registry it writes out can be applied again.
    """

    env: str | None = None
    file: str | None = None


MAX_DISABLED_URLS = 100
"""So many addresses of a tenant are remembered as switched off: the ones of the last."""


IPAddress = IPv4Address | IPv6Address


IPNetwork = IPv4Network | IPv6Network


_PRIVATE_NETWORKS: tuple[IPNetwork, ...] = (
    IPv4Network("10.0.0.0/8"),
    IPv4Network("172.16.0.0/12"),
    IPv4Network("192.168.0.0/16"),
    IPv6Network("fc00::/7"),
)


class WebhookSecrets(Struct, frozen=True):
    """The sealed secrets of a tenant: the one in force, and the one before, which signs too until `until` (seconds).

    `origin` is where the one in force came from, if the registry was applied from a file.
    """

    current: bytes
    previous: bytes | None = None
    previous_expires_at: float = 0
    secret_ref: SecretRef | None = None

    def active_secrets(self, now: float) -> tuple[bytes, ...]:
        """The sealed secrets that sign at a time, the newer one first."""
        return (self.current, self.previous) if self.previous and now < self.previous_expires_at else (self.current,)


class Webhook(Struct, frozen=True):
    """Where a tenant is told: at `url` by default, or wherever a task says, at a host of `allow`.

    Without a `url` it is told nothing; the secrets stay for the day when it has one again. `off` has the addresses
    that have said that they are gone.
    """

    url: str | None = None
    allow: tuple[str, ...] = ()
    secrets: WebhookSecrets | None = None
    disabled_urls: tuple[str, ...] = ()

    def allows_url(self, url: str) -> bool:
        """Whether the tenant may be told at an address."""
        host = _host_of(url)
        if self.url is None or host is None:
            return False
        return host in {_host_of(self.url), *self.allow} or _covers_host(self.allow, host)

    def allows_address(self, ip: IPAddress) -> bool:
        """Whether a host of the tenant may be at an address that is not public: a private one, or one of `allow`."""
        return any(ip in network for network in (*_PRIVATE_NETWORKS, *_parse_networks(self.allow)))

    def with_secret(self, current: WebhookSecrets | None, new_secret: bytes | None, generated_secret: bytes) -> Webhook:
        """The same with the sealed secret that was given, else what it had before, else a fresh one if it needs one."""
        if new_secret is not None and (current is None or current.current != new_secret):
            current = WebhookSecrets(new_secret)
        elif current is None and self.url is not None:
            current = WebhookSecrets(generated_secret)
        return replace(self, secrets=current)

    def is_disabled(self, url: str) -> bool:
        """Whether an address was switched off."""
        return strip_query(url) in self.disabled_urls

    def with_disabled_url(self, url: str) -> Webhook:
        """The same with one address more that is not asked any longer."""
        off = tuple(each for each in self.disabled_urls if each != strip_query(url))
        return replace(self, disabled_urls=(*off, strip_query(url))[-MAX_DISABLED_URLS:])


def strip_query(url: str) -> str:
    """An address as far as it may be shown: what identifies somebody tends to stand in the query."""
    return url.partition("?")[0]


def _host_of(url: str) -> str | None:
    return urlsplit(url).hostname


def parse_network(entry: str) -> IPNetwork | None:
    try:
        return ip_network(entry)
    except ValueError:
        return None


def _parse_networks(allow: Sequence[str]) -> list[IPNetwork]:
    return [network for network in map(parse_network, allow) if network]


def _covers_host(allow: Sequence[str], host: str) -> bool:
    """Whether a host is an address in one of the networks."""
    try:
        ip = ip_address(host)
    except ValueError:
        return False
    return any(ip in network for network in _parse_networks(allow))


NAME_RULE = "be up to 63 lower-case letters, digits, dots, dashes and underscores, a letter or digit first"


Name = Annotated[
    str,
    Meta(pattern=r"\A[a-z0-9][a-z0-9._-]{0,62}\Z", description="A name of your choice.", extra={"must": NAME_RULE}),
]


TOKEN_PREFIX = "igw_"  # noqa: S105 - what makes a leaked token recognisable, not a secret


_TOKEN_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # noqa: S105 - an alphabet


_TOKEN_SECRET_CHARS = 32


_TOKEN_CHECKSUM_CHARS = 6


class Window(StrEnum):
    """A span of calendar time in UTC in which spending is counted; `total` never resets."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


class SpendingMode(StrEnum):
    """What of an account a tenant may spend."""

    COUNT_ONLY = "count_only"
    COUNT_THEN_MONEY = "count_then_money"


class Limit(Struct, frozen=True):
    """How much may be spent in one window: tasks, and money in fen. None is no limit."""

    window: Window
    tasks: int | None = None
    money_fen: int | None = None


class TenantPolicy(Struct, frozen=True):
    """What a tenant may spend."""

    limits: tuple[Limit, ...] = ()
    max_active: int | None = None
    spending_mode: SpendingMode = SpendingMode.COUNT_THEN_MONEY


class Tenant(Struct, frozen=True):
    """A service that may submit tasks. The id is never reused, the name can be; accounts are used in order."""

    id: int
    name: str
    accounts: tuple[str, ...]
    policy: TenantPolicy = TenantPolicy()
    kinds: tuple[Kind, ...] | None = None
    disabled: bool = False
    webhook: Webhook = Webhook()

    def can_submit(self, kind: Kind) -> bool:
        """Whether the tenant is allowed this kind; without a list it is allowed all."""
        return self.kinds is None or kind in self.kinds


class AccountPolicy(Struct, frozen=True):
    """What must stay in an account, and the highest price of each kind, in fen."""

    floor_count: int = 0
    floor_money_fen: int = 0
    max_price: Mapping[Kind, int] = {}


class Account(Struct, frozen=True):
    """An account at an upstream. `user_key` is sealed; without `base_url` it is at the default upstream.

    `origin` is where its key came from, if the registry was applied from a file.
    """

    id: int
    name: str
    user_key: bytes
    base_url: str | None = None
    policy: AccountPolicy = AccountPolicy()
    secret_ref: SecretRef | None = None


class Token(Struct, frozen=True):
    """A bearer token of a tenant, of which only the hash is kept; times in seconds since the epoch."""

    id: str
    tenant: int
    digest: bytes
    label: str | None
    created_at: float
    expires_at: float | None = None

    def is_valid_at(self, now: float) -> bool:
        """Whether it has not expired yet; revoking with a grace sets the expiry too."""
        return self.expires_at is None or now < self.expires_at


def generate_token() -> str:
    """Make a token: a recognisable prefix, 190 random bits, and a checksum that tells a typo from a guess."""
    secret = "".join(secrets.choice(_TOKEN_ALPHABET) for _ in range(_TOKEN_SECRET_CHARS))
    return f"{TOKEN_PREFIX}{secret}{_token_checksum(secret)}"


def has_valid_checksum(token: str) -> bool:
    """Whether the prefix and the checksum fit, which needs no look-up."""
    body = token.removeprefix(TOKEN_PREFIX)
    secret, check = body[:_TOKEN_SECRET_CHARS], body[_TOKEN_SECRET_CHARS:]
    if body == token or len(body) != _TOKEN_SECRET_CHARS + _TOKEN_CHECKSUM_CHARS or not body.isascii():
        return False
    return hmac.compare_digest(check, _token_checksum(secret))


def hash_token(token: str) -> bytes:
    """The hash under which a token is kept. It has enough entropy of its own to need no salt."""
    return hashlib.sha256(token.encode()).digest()


def _token_checksum(secret: str) -> str:
    number, digits = zlib.crc32(secret.encode()), ""
    for _ in range(_TOKEN_CHECKSUM_CHARS):
        number, digit = divmod(number, len(_TOKEN_ALPHABET))
        digits = _TOKEN_ALPHABET[digit] + digits
    return digits


class Registry:
    """One version of the registry, indexed for the questions that requests ask. Never changes.

    `former` has the name of each deleted tenant by its id, so that what it spent stays explained.
    """

    def __init__(
        self,
        version: int = 0,
        next_id: int = 1,
        tenants: Mapping[str, Tenant] | None = None,
        accounts: Mapping[str, Account] | None = None,
        tokens: Mapping[str, Token] | None = None,
        deleted_tenant_names: Mapping[int, str] | None = None,
    ) -> None:
        self.version = version
        self.next_id = next_id
        self.tenants = tenants or {}
        self.accounts = accounts or {}
        self.tokens = tokens or {}
        self.deleted_tenant_names = deleted_tenant_names or {}
        self._tenants_by_id = {tenant.id: tenant for tenant in self.tenants.values()}
        self._accounts_by_id = {account.id: account for account in self.accounts.values()}
        self._tokens_by_digest = {token.digest: token for token in self.tokens.values()}

    def tenant_by_token(self, digest: bytes) -> tuple[Tenant, Token] | None:
        """Whose token has this hash, whether or not it has expired."""
        token = self._tokens_by_digest.get(digest)
        tenant = self._tenants_by_id.get(token.tenant) if token else None
        return (tenant, token) if tenant and token else None

    def tenant_by_id(self, tenant_id: int) -> Tenant | None:
        """A tenant by its id."""
        return self._tenants_by_id.get(tenant_id)

    def tenant_name(self, tenant_id: int) -> str | None:
        """What a tenant is or was called; None if it never was in this registry."""
        found = self.tenant_by_id(tenant_id)
        return found.name if found else self.deleted_tenant_names.get(tenant_id)

    def account_by_id(self, account_id: int) -> Account | None:
        """An account by its id."""
        return self._accounts_by_id.get(account_id)

    def accounts_of(self, tenant: Tenant) -> tuple[Account, ...]:
        """The accounts a tenant may use, in order; those that were deleted since are left out."""
        return tuple(self.accounts[name] for name in tenant.accounts if name in self.accounts)

    def tokens_of(self, tenant: Tenant) -> tuple[Token, ...]:
        """The tokens of a tenant, oldest first."""
        return tuple(
            sorted((t for t in self.tokens.values() if t.tenant == tenant.id), key=lambda t: (t.created_at, t.id))
        )
