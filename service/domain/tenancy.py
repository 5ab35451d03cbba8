"""Who may ask (tenants and their tokens) and who pays (upstream accounts)."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import zlib
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from service.domain.origin import Origin
from service.domain.task import Kind
from service.domain.webhook import Webhook

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
