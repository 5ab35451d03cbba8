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


class Origin(Struct, frozen=True, omit_defaults=True):
    """Where whoever applies the registry finds a secret: in a variable of the environment, or in a file.

    The gateway never looks there: it only remembers, so that the registry it writes out can be applied again.
    """

    env: str | None = None
    file: str | None = None


MAX_OFF = 100
"""So many addresses of a tenant are remembered as switched off: the ones of the last."""


Address = IPv4Address | IPv6Address


Network = IPv4Network | IPv6Network


_PRIVATE: tuple[Network, ...] = (
    IPv4Network("10.0.0.0/8"),
    IPv4Network("172.16.0.0/12"),
    IPv4Network("192.168.0.0/16"),
    IPv6Network("fc00::/7"),
)


class Signing(Struct, frozen=True):
    """The sealed secrets of a tenant: the one in force, and the one before, which signs too until `until` (seconds).

    `origin` is where the one in force came from, if the registry was applied from a file.
    """

    secret: bytes
    former: bytes | None = None
    until: float = 0
    origin: Origin | None = None

    def in_force(self, now: float) -> tuple[bytes, ...]:
        """The sealed secrets that sign at a time, the newer one first."""
        return (self.secret, self.former) if self.former and now < self.until else (self.secret,)


class Webhook(Struct, frozen=True):
    """Where a tenant is told: at `url` by default, or wherever a task says, at a host of `allow`.

    Without a `url` it is told nothing; the secrets stay for the day when it has one again. `off` has the addresses
    that have said that they are gone.
    """

    url: str | None = None
    allow: tuple[str, ...] = ()
    signing: Signing | None = None
    off: tuple[str, ...] = ()

    def permits(self, url: str) -> bool:
        """Whether the tenant may be told at an address."""
        host = _host(url)
        if self.url is None or host is None:
            return False
        return host in {_host(self.url), *self.allow} or _covers(self.allow, host)

    def may_reach(self, ip: Address) -> bool:
        """Whether a host of the tenant may be at an address that is not public: a private one, or one of `allow`."""
        return any(ip in network for network in (*_PRIVATE, *_networks(self.allow)))

    def signed(self, before: Signing | None, given: bytes | None, fresh: bytes) -> Webhook:
        """The same with the sealed secret that was given, else what it had before, else a fresh one if it needs one."""
        if given is not None and (before is None or before.secret != given):
            before = Signing(given)
        elif before is None and self.url is not None:
            before = Signing(fresh)
        return replace(self, signing=before)

    def is_off(self, url: str) -> bool:
        """Whether an address was switched off."""
        return without_query(url) in self.off

    def switched_off(self, url: str) -> Webhook:
        """The same with one address more that is not asked any longer."""
        off = tuple(each for each in self.off if each != without_query(url))
        return replace(self, off=(*off, without_query(url))[-MAX_OFF:])


def without_query(url: str) -> str:
    """An address as far as it may be shown: what identifies somebody tends to stand in the query."""
    return url.partition("?")[0]


def _host(url: str) -> str | None:
    return urlsplit(url).hostname


def parse_network(entry: str) -> Network | None:
    try:
        return ip_network(entry)
    except ValueError:
        return None


def _networks(allow: Sequence[str]) -> list[Network]:
    return [network for network in map(parse_network, allow) if network]


def _covers(allow: Sequence[str], host: str) -> bool:
    """Whether a host is an address in one of the networks."""
    try:
        ip = ip_address(host)
    except ValueError:
        return False
    return any(ip in network for network in _networks(allow))


NAME_MUST = "be up to 63 lower-case letters, digits, dots, dashes and underscores, a letter or digit first"


Name = Annotated[
    str,
    Meta(pattern=r"\A[a-z0-9][a-z0-9._-]{0,62}\Z", description="A name of your choice.", extra={"must": NAME_MUST}),
]


TOKEN_PREFIX = "igw_"  # noqa: S105 - what makes a leaked token recognisable, not a secret


_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


_SECRET_DIGITS = 32


_CHECK_DIGITS = 6


class Window(StrEnum):
    """A span of calendar time in UTC in which spending is counted; `total` never resets."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


class Purse(StrEnum):
    """What of an account a tenant may spend."""

    COUNT_ONLY = "count_only"
    COUNT_THEN_MONEY = "count_then_money"


class Limit(Struct, frozen=True):
    """How much may be spent in one window: tasks, and money in fen. None is no limit."""

    window: Window
    tasks: int | None = None
    money: int | None = None


class TenantPolicy(Struct, frozen=True):
    """What a tenant may spend."""

    limits: tuple[Limit, ...] = ()
    max_active: int | None = None
    purse: Purse = Purse.COUNT_THEN_MONEY


class Tenant(Struct, frozen=True):
    """A service that may submit tasks. The id is never reused, the name can be; accounts are used in order."""

    id: int
    name: str
    accounts: tuple[str, ...]
    policy: TenantPolicy = TenantPolicy()
    kinds: tuple[Kind, ...] | None = None
    disabled: bool = False
    webhook: Webhook = Webhook()

    def may_submit(self, kind: Kind) -> bool:
        """Whether the tenant is allowed this kind; without a list it is allowed all."""
        return self.kinds is None or kind in self.kinds


class AccountPolicy(Struct, frozen=True):
    """What must stay in an account, and the highest price of each kind, in fen."""

    floor_count: int = 0
    floor_money: int = 0
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
    origin: Origin | None = None


class Token(Struct, frozen=True):
    """A bearer token of a tenant, of which only the hash is kept; times in seconds since the epoch."""

    id: str
    tenant: int
    digest: bytes
    label: str | None
    created: float
    expires: float | None = None

    def valid_at(self, now: float) -> bool:
        """Whether it has not expired yet; revoking with a grace sets the expiry too."""
        return self.expires is None or now < self.expires


def new_token() -> str:
    """Make a token: a recognisable prefix, 190 random bits, and a checksum that tells a typo from a guess."""
    secret = "".join(secrets.choice(_ALPHABET) for _ in range(_SECRET_DIGITS))
    return f"{TOKEN_PREFIX}{secret}{_checksum(secret)}"


def well_formed(token: str) -> bool:
    """Whether the prefix and the checksum fit, which needs no look-up."""
    body = token.removeprefix(TOKEN_PREFIX)
    secret, check = body[:_SECRET_DIGITS], body[_SECRET_DIGITS:]
    if body == token or len(body) != _SECRET_DIGITS + _CHECK_DIGITS or not body.isascii():
        return False
    return hmac.compare_digest(check, _checksum(secret))


def digest(token: str) -> bytes:
    """The hash under which a token is kept. It has enough entropy of its own to need no salt."""
    return hashlib.sha256(token.encode()).digest()


def _checksum(secret: str) -> str:
    number, digits = zlib.crc32(secret.encode()), ""
    for _ in range(_CHECK_DIGITS):
        number, digit = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
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
        former: Mapping[int, str] | None = None,
    ) -> None:
        self.version = version
        self.next_id = next_id
        self.tenants = tenants or {}
        self.accounts = accounts or {}
        self.tokens = tokens or {}
        self.former = former or {}
        self._tenants_by_id = {tenant.id: tenant for tenant in self.tenants.values()}
        self._accounts_by_id = {account.id: account for account in self.accounts.values()}
        self._tokens_by_digest = {token.digest: token for token in self.tokens.values()}

    def tenant_by_token(self, digest: bytes) -> tuple[Tenant, Token] | None:
        """Whose token has this hash, whether or not it has expired."""
        token = self._tokens_by_digest.get(digest)
        tenant = self._tenants_by_id.get(token.tenant) if token else None
        return (tenant, token) if tenant and token else None

    def tenant(self, tenant_id: int) -> Tenant | None:
        """A tenant by its id."""
        return self._tenants_by_id.get(tenant_id)

    def tenant_name(self, tenant_id: int) -> str | None:
        """What a tenant is or was called; None if it never was in this registry."""
        found = self.tenant(tenant_id)
        return found.name if found else self.former.get(tenant_id)

    def account(self, account_id: int) -> Account | None:
        """An account by its id."""
        return self._accounts_by_id.get(account_id)

    def accounts_of(self, tenant: Tenant) -> tuple[Account, ...]:
        """The accounts a tenant may use, in order; those that were deleted since are left out."""
        return tuple(self.accounts[name] for name in tenant.accounts if name in self.accounts)

    def tokens_of(self, tenant: Tenant) -> tuple[Token, ...]:
        """The tokens of a tenant, oldest first."""
        return tuple(
            sorted((t for t in self.tokens.values() if t.tenant == tenant.id), key=lambda t: (t.created, t.id))
        )
