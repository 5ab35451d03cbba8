"""The registry as one document, from which it can be made again: hashes of tokens, and where secrets are, but none."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

from msgspec import Meta, Struct
from msgspec.structs import replace

from service.api.admin_views import END_OF_TIME, AccountBody, GivenYuan, LimitBody, TenantBody, Whole
from service.api.views import yuan
from service.api.webhook_views import WebhookBody
from service.domain import webhooks
from service.domain.errors import Faults, FieldError, InvalidOptions, dotted
from service.domain.tasks import Kind
from service.domain.tenants import Account, AccountPolicy, Limit, Name, Origin, Purse, Registry, Tenant, Token, Window
from service.domain.webhooks import MAX_ALLOWED, MAX_URL
from service.usecases.admin import Resealed
from service.usecases.registry_apply import Plan, Wanted, WantedAccount, WantedTenant

_Id = Annotated[int, Meta(ge=1, le=2**53, description="Behind the name: tasks and usage belong to it. As it is.")]
_TokenId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{12}\Z", extra={"must": "be 12 hexadecimal digits in lower case"})]
_Hash = Annotated[
    str,
    Meta(
        pattern=r"\A[0-9a-f]{64}\Z",
        description="Of the token, in hexadecimal digits. It tells nobody the token.",
        extra={"must": "be 64 hexadecimal digits in lower case"},
    ),
]
_Moment = Annotated[datetime, Meta(tz=True)]
_Place = Annotated[str, Meta(min_length=1, max_length=4_096)]


class SecretEntry(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A secret by where it is. The gateway remembers that, and takes the secret itself from `value` only."""

    env: Annotated[_Place | None, Meta(description="A variable of the environment of whoever applies this.")] = None
    file: Annotated[_Place | None, Meta(description="A file there.")] = None
    value: (
        Annotated[str, Meta(max_length=512, description="The secret itself; without it is kept. Never told.")] | None
    ) = None

    def origin(self) -> Origin | None:
        """Where it is."""
        return Origin(self.env, self.file) if self.env or self.file else None


class AccountEntry(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An account at the upstream. What is left out gets its default, but for the id and the key."""

    id: _Id | None = None
    user_key: SecretEntry | None = None
    base_url: Annotated[str, Meta(max_length=512, description="Where the upstream is, if not as usual.")] | None = None
    floor_count: Whole = 0
    floor_money: GivenYuan = 0
    max_price: Annotated[dict[Kind, GivenYuan], Meta(description="The most a task of a kind can cost.")] = {}

    def wanted(self, name: str, faults: Faults) -> WantedAccount:
        """What it describes."""
        where, entry = dotted("accounts", name), self.user_key or SecretEntry()
        body = AccountBody(entry.value, self.base_url, self.floor_count, self.floor_money, self.max_price)
        key = faults.attempt(where, None, body.key)
        url = faults.attempt(where, None, body.url)
        policy = faults.attempt(where, AccountPolicy(), body.policy)
        account = Account(self.id or 0, name, b"", url, policy, entry.origin())
        return WantedAccount(account, None if key is None else key.encode())


class TokenEntry(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A token, of which only the hash is known."""

    sha256: _Hash
    label: Annotated[str, Meta(max_length=200, description="What it is for.")] | None = None
    created_at: _Moment | None = None
    expires_at: _Moment | None = None

    def token(self, token_id: str, where: str, faults: Faults) -> Token:
        """What it describes. Its tenant is to be said yet."""
        where = f"{where}.{dotted('tokens', token_id)}"
        created = faults.attempt(where, None, _seconds, "created_at", self.created_at) or 0
        expires = faults.attempt(where, None, _seconds, "expires_at", self.expires_at)
        return Token(token_id, 0, bytes.fromhex(self.sha256), self.label, created, expires)


class WebhookEntry(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a tenant is told of the ends of its tasks."""

    url: Annotated[str, Meta(max_length=MAX_URL)]
    allow: Annotated[list[Annotated[str, Meta(max_length=255)]], Meta(max_length=MAX_ALLOWED)] = []
    secret: SecretEntry | None = None


class TenantEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A tenant and its tokens. What is left out gets its default, but for the id and the secret."""

    id: _Id | None = None
    accounts: Annotated[list[Name], Meta(max_length=100, description="The accounts it may use, in order.")]
    limits: Annotated[list[LimitBody], Meta(max_length=len(Window), description="At most one per window.")] = []
    max_active: Whole | None = None
    purse: Purse = Purse.COUNT_THEN_MONEY
    kinds: Annotated[list[Kind] | None, Meta(description="The kinds it may submit; all without it.")] = None
    webhook: WebhookEntry | None = None
    disabled: bool = False
    tokens: Annotated[dict[_TokenId, TokenEntry], Meta(description="By their ids.")] = {}

    def wanted(self, name: str, faults: Faults) -> WantedTenant:
        """What it describes."""
        where, told = dotted("tenants", name), self.webhook
        entry = told.secret if told and told.secret else SecretEntry()
        body = TenantBody(
            accounts=self.accounts,
            limits=self.limits,
            max_active=self.max_active,
            purse=self.purse,
            kinds=self.kinds,
            webhook=WebhookBody(told.url, entry.value, told.allow) if told else None,
            disabled=self.disabled,
        )
        tenant = faults.attempt(where, Tenant(0, name, ()), body.tenant, name)
        secret = faults.attempt(where, b"", webhooks.parse_secret, entry.value) if entry.value is not None else None
        tokens = tuple(each.token(token_id, where, faults) for token_id, each in self.tokens.items())
        return WantedTenant(replace(tenant, id=self.id or 0), tokens, secret, entry.origin())


class RegistryBody(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The whole registry but for its history: accounts and tenants by their names."""

    accounts: dict[Name, AccountEntry] = {}
    tenants: dict[Name, TenantEntry] = {}

    def wanted(self, *, prune: bool) -> Wanted:
        """What it describes. Raises InvalidOptions with all faults."""
        faults = Faults()
        accounts = tuple(each.wanted(name, faults) for name, each in self.accounts.items())
        tenants = tuple(each.wanted(name, faults) for name, each in self.tenants.items())
        faults.check()
        return Wanted(accounts, tenants, prune)


Part = dict[str, Any] | list[Any] | str | bool | float | None
"""A part of the registry, however small."""


class DifferenceKind(StrEnum):
    """What is different somewhere."""

    ADDED = "added"
    CHANGED = "changed"
    REMOVED = "removed"


class DifferenceView(Struct, frozen=True, omit_defaults=True):
    """What is different at one place; of secrets only that they are."""

    path: Annotated[str, Meta(examples=["tenants.shop.max_active"])]
    what: DifferenceKind
    before: Annotated[Part, Meta(description="Absent if there was nothing.")] = None
    after: Annotated[Part, Meta(description="Absent if there is nothing any more.")] = None


class AppliedView(Struct, frozen=True):
    """How the registry became, or would become, what was sent."""

    applied: Annotated[bool, Meta(description="False for a dry run, and if there was nothing to do.")]
    differences: list[DifferenceView]
    kept: Annotated[list[str], Meta(description="What was not sent and is there all the same: `prune` removes it.")]
    secrets: Annotated[
        dict[str, str], Meta(description="Webhook secrets that were made, by tenant. They are shown this once.")
    ]


class ResealedView(Struct, frozen=True):
    """What was sealed with the first of the secret keys."""

    accounts: Annotated[list[str], Meta(description="Whose keys were sealed anew.")]
    tenants: Annotated[list[str], Meta(description="Whose webhook secrets were sealed anew.")]
    lost: Annotated[
        list[str],
        Meta(description="What no secret key opens, and is as it was.", examples=[["accounts.main.user_key"]]),
    ]


def registry_body(found: Registry, now: float) -> RegistryBody:
    """The registry as it is at a time (seconds since the epoch), by name; without tokens that have expired."""
    tokens = defaultdict[int, list[Token]](list)
    for token in sorted(found.tokens.values(), key=lambda each: (each.created, each.id)):
        if token.valid_at(now):
            tokens[token.tenant].append(token)
    return RegistryBody(
        {name: _account(each) for name, each in sorted(found.accounts.items())},
        {name: _tenant(each, tokens[each.id]) for name, each in sorted(found.tenants.items())},
    )


def applied_view(plan: Plan, differences: list[DifferenceView], *, dry_run: bool) -> AppliedView:
    """A plan as operators see it."""
    applied = plan.change is not None and not dry_run
    return AppliedView(applied, differences, list(plan.kept), dict(plan.made) if applied else {})


def resealed_view(found: Resealed) -> ResealedView:
    """What was sealed anew, as operators see it."""
    return ResealedView(list(found.accounts), list(found.tenants), list(found.lost))


def _seconds(field: str, moment: datetime | None) -> float | None:
    """A moment in seconds since the epoch. Raises InvalidOptions if not every clock can show it."""
    seconds = moment.timestamp() if moment else None
    if seconds is not None and not 0 <= seconds <= END_OF_TIME:
        raise InvalidOptions([FieldError(field, "must be between the years 1970 and 9999")])
    return seconds


def _account(account: Account) -> AccountEntry:
    policy = account.policy
    return AccountEntry(
        id=account.id,
        user_key=_secret(account.origin),
        base_url=account.base_url,
        floor_count=policy.floor_count,
        floor_money=yuan(policy.floor_money),
        max_price={kind: yuan(price) for kind, price in policy.max_price.items()},
    )


def _tenant(tenant: Tenant, tokens: list[Token]) -> TenantEntry:
    told, signing = tenant.webhook, tenant.webhook.signing
    secret = _secret(signing.origin) if signing else None
    return TenantEntry(
        id=tenant.id,
        accounts=list(tenant.accounts),
        limits=[_limit(each) for each in tenant.policy.limits],
        max_active=tenant.policy.max_active,
        purse=tenant.policy.purse,
        kinds=None if tenant.kinds is None else list(tenant.kinds),
        webhook=None if told.url is None else WebhookEntry(told.url, list(told.allow), secret),
        disabled=tenant.disabled,
        tokens={each.id: _token(each) for each in tokens},
    )


def _limit(limit: Limit) -> LimitBody:
    return LimitBody(limit.window, limit.tasks, None if limit.money is None else yuan(limit.money))


def _token(token: Token) -> TokenEntry:
    expires = None if token.expires is None else datetime.fromtimestamp(token.expires, UTC)
    return TokenEntry(token.digest.hex(), token.label, datetime.fromtimestamp(token.created, UTC), expires)


def _secret(origin: Origin | None) -> SecretEntry | None:
    return SecretEntry(origin.env, origin.file) if origin else None
