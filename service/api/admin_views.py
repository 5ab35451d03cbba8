"""What operators send and see. Secrets can be set, never read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated
from urllib.parse import urlsplit

from msgspec import Meta, Struct

from service.api.views import FEN, AmountView, PolicyView, Yuan, moment, quota_view, yuan
from service.api.webhook_views import WebhookBody, WebhookView, webhook_view
from service.domain.errors import Faults, FieldError, InvalidOptions
from service.domain.ledger import AccountState, Figure, Source, Status
from service.domain.tasks import Kind
from service.domain.tenants import (
    Account,
    AccountPolicy,
    Limit,
    Name,
    Purse,
    Tenant,
    TenantPolicy,
    Token,
    Webhook,
    Window,
)
from service.usecases.reports import QuotaReport

_MOST = 10**12
_MOST_YUAN = 10**10
END_OF_TIME = datetime(9999, 12, 31, tzinfo=UTC).timestamp()

Whole = Annotated[int, Meta(ge=0, le=_MOST)]
GivenYuan = Annotated[float, Meta(ge=0, le=_MOST_YUAN, description="Yuan, with at most two decimals.")]


class AccountBody(Struct, frozen=True, forbid_unknown_fields=True):
    """An account at the upstream. What is left out gets its default; only the key is kept."""

    user_key: Annotated[str, Meta(min_length=1, max_length=512, description="Of printable ASCII.")] | None = None
    base_url: Annotated[str, Meta(max_length=512, description="Where the upstream is, if not as usual.")] | None = None
    floor_count: Whole = 0
    floor_money: GivenYuan = 0
    max_price: Annotated[dict[Kind, GivenYuan], Meta(description="The most a task of a kind can cost.")] = {}

    def key(self) -> str | None:
        """The key, if one is given. Raises InvalidOptions, without it, for what can't be one."""
        if self.user_key is not None and not re.fullmatch(r"[!-~]+", self.user_key):
            raise InvalidOptions([FieldError("user_key", "must be printable ASCII without spaces")])
        return self.user_key

    def url(self) -> str | None:
        """The base address without a slash at its end. Raises InvalidOptions for what is none."""
        if self.base_url is None:
            return None
        if not _is_base_url(self.base_url):
            wanted = "must be a URL such as http://host or https://host/path, without credentials, query or fragment"
            raise InvalidOptions([FieldError("base_url", wanted)])
        return self.base_url.rstrip("/")

    def policy(self) -> AccountPolicy:
        """The part that the ledger goes by. Raises InvalidOptions for amounts that are none."""
        faults = Faults()
        floor = faults.attempt("", 0, _fen, "floor_money", self.floor_money)
        prices = {kind: faults.attempt("max_price", 0, _fen, kind, each) for kind, each in self.max_price.items()}
        faults.check()
        return AccountPolicy(self.floor_count, floor, prices)


class LimitBody(Struct, frozen=True, forbid_unknown_fields=True):
    """How much may be spent in one window of calendar time in UTC."""

    window: Window
    tasks: Whole | None = None
    money: GivenYuan | None = None


class TenantBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A tenant. What is left out gets its default."""

    accounts: Annotated[list[Name], Meta(max_length=100, description="The accounts it may use, in order.")]
    limits: Annotated[list[LimitBody], Meta(max_length=len(Window), description="At most one per window.")] = []
    max_active: Whole | None = None
    purse: Purse = Purse.COUNT_THEN_MONEY
    kinds: Annotated[list[Kind] | None, Meta(description="The kinds it may submit; all without it.")] = None
    webhook: WebhookBody | None = None
    disabled: bool = False

    def tenant(self, name: str) -> Tenant:
        """The tenant it describes, without its id. Raises InvalidOptions."""
        faults = Faults()
        faults.found += [
            *_repeated("accounts", "account", self.accounts),
            *_repeated("limits", "window", [limit.window for limit in self.limits]),
            *_repeated("kinds", "kind", self.kinds or []),
        ]
        limits = []
        for place, each in enumerate(self.limits):
            if each.tasks is None and each.money is None:
                faults.add(f"limits[{place}]", "must limit tasks, money or both")
            money = each.money and faults.attempt(f"limits[{place}]", 0, _fen, "money", each.money)
            limits.append(Limit(each.window, each.tasks, None if money is None else int(money)))
        webhook = faults.attempt("", Webhook(), self.webhook.webhook) if self.webhook else Webhook()
        faults.check()
        return Tenant(
            id=0,
            name=name,
            accounts=tuple(self.accounts),
            policy=TenantPolicy(limits=tuple(limits), max_active=self.max_active, purse=self.purse),
            kinds=None if self.kinds is None else tuple(self.kinds),
            disabled=self.disabled,
            webhook=webhook,
        )


class TokenBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A token to be made."""

    label: Annotated[str, Meta(max_length=200, description="What it is for.")] | None = None
    expires_at: Annotated[datetime, Meta(tz=True, description="With a time zone.")] | None = None

    def expires(self, now: float) -> float | None:
        """When it expires, in seconds since the epoch. Raises InvalidOptions if it has, or if no clock will show it."""
        if self.expires_at is None:
            return None
        seconds = self.expires_at.timestamp()
        if not 0 <= seconds <= END_OF_TIME:
            raise InvalidOptions([FieldError("expires_at", "must be between the years 1970 and 9999")])
        if seconds <= now:
            raise InvalidOptions([FieldError("expires_at", "must lie ahead")])
        return seconds


class NewTokenView(Struct, frozen=True):
    """A token that was just made. Its text is shown this once."""

    id: str
    token: str
    expires_at: datetime | None


class TokenView(Struct, frozen=True):
    """A token of which only the hash is kept."""

    id: str
    label: str | None
    created_at: datetime
    expires_at: datetime | None


class FigureView(Struct, frozen=True):
    """A figure the upstream told: when, and in the answer to which call."""

    value: int | float
    seen_at: datetime | None
    seen_in: Source


class AccountView(Struct, frozen=True):
    """An account: what is known of its balance, whether it is used, and what is under way on it."""

    name: str
    state: Status
    base_url: str | None
    floor_count: int
    floor_money: Yuan
    max_price: dict[Kind, Yuan]
    remaining_count: FigureView | None
    remaining_money: FigureView | None
    look_again_at: datetime | None
    in_flight: Annotated[int, Meta(description="Submissions that have not ended.")]
    unknown: Annotated[int, Meta(description="Submissions of which nobody knows whether they were charged.")]
    unexplained: Annotated[AmountView, Meta(description="Taken by no submission of the gateway: who else has the key?")]
    prices: Annotated[dict[Kind, Yuan], Meta(description="What a task of each kind last took in money.")]
    looks: Annotated[bool, Meta(description="Whether checking a finished task again tells the balance of now.")]


class AccountList(Struct, frozen=True):
    """All accounts, by name."""

    items: list[AccountView]


class TenantView(Struct, frozen=True):
    """A tenant: what it may do, what it used, and its tokens."""

    name: str
    accounts: list[str]
    limits: list[LimitView]
    max_active: int | None
    purse: Purse
    kinds: list[Kind] | None
    webhook: WebhookView | None
    disabled: bool
    policies: list[PolicyView]
    tokens: list[TokenView]


class LimitView(Struct, frozen=True):
    """What may be spent in one window."""

    window: Window
    tasks: int | None
    money: int | float | None


class TenantList(Struct, frozen=True):
    """All tenants, by name."""

    items: list[TenantView]


def account_view(account: Account, state: AccountState) -> AccountView:
    """An account as operators see it."""
    return AccountView(
        name=account.name,
        state=state.status,
        base_url=account.base_url,
        floor_count=account.policy.floor_count,
        floor_money=yuan(account.policy.floor_money),
        max_price={kind: yuan(price) for kind, price in account.policy.max_price.items()},
        remaining_count=_figure(state.count, 1),
        remaining_money=_figure(state.money, FEN),
        look_again_at=moment(state.probe_at) if state.status is Status.EXHAUSTED else None,
        in_flight=state.open,
        unknown=state.unknown,
        unexplained=AmountView(state.unexplained_count, yuan(state.unexplained_money)),
        prices={kind: yuan(price) for kind, price in state.prices.items()},
        looks=state.looks,
    )


def tenant_view(
    tenant: Tenant, tokens: tuple[Token, ...], report: QuotaReport, secret: str | None = None
) -> TenantView:
    """A tenant as operators see it, with the secret of its webhook if that was just made."""
    limits = tenant.policy.limits
    return TenantView(
        name=tenant.name,
        accounts=list(tenant.accounts),
        limits=[
            LimitView(each.window, each.tasks, None if each.money is None else yuan(each.money)) for each in limits
        ],
        max_active=tenant.policy.max_active,
        purse=tenant.policy.purse,
        kinds=None if tenant.kinds is None else list(tenant.kinds),
        webhook=webhook_view(tenant.webhook, secret),
        disabled=tenant.disabled,
        policies=quota_view(report).policies,
        tokens=[token_view(token) for token in tokens],
    )


def token_view(token: Token) -> TokenView:
    """A token as operators see it."""
    return TokenView(token.id, token.label, _moment(token.created), expiry(token))


def expiry(token: Token) -> datetime | None:
    """When a token expires."""
    return None if token.expires is None else _moment(token.expires)


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _figure(figure: Figure | None, unit: int) -> FigureView | None:
    if figure is None:
        return None
    return FigureView(figure.value if unit == 1 else yuan(figure.value), moment(figure.received), figure.source)


def _fen(field: str, amount: float) -> int:
    """Yuan as fen. Raises InvalidOptions for fractions of a fen."""
    fen = Decimal(repr(amount)) * FEN  # the digits that were sent, and not those of the nearest binary fraction
    if fen != int(fen):
        raise InvalidOptions([FieldError(field, "must be an amount in yuan with at most two decimals")])
    return int(fen)


def _is_base_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port  # reading them is what checks them
    except ValueError:
        return False
    plain = re.fullmatch(r"[!-~]+", text) and "@" not in parts.netloc and "?" not in text and "#" not in text
    return bool(plain and host and parts.scheme in {"http", "https"})


def _repeated(field: str, what: str, values: Sequence[str]) -> Sequence[FieldError]:
    return [FieldError(field, f"must name each {what} at most once")] if len(set(values)) < len(values) else []
