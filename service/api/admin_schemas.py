"""JSON of the operators' API. Secrets can be set, never read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import asdict

from service.api.schemas import (
    FEN_PER_YUAN,
    Amount,
    Policy,
    QuotaThreshold,
    Task,
    Yuan,
    render_policies,
    render_task,
    render_threshold,
    to_datetime,
    to_yuan,
)
from service.domain import tasks, tenants, webhooks
from service.domain.errors import ErrorCollector, FieldError, InvalidOptions, field_path
from service.domain.hosts import parse_base_url
from service.domain.ledger import AccountState, AccountStatus, BalanceReading, ReadingSource
from service.domain.tasks import Kind
from service.domain.tenants import (
    AccountPolicy,
    Name,
    SpendingMode,
    TenantPolicy,
    TenantStatus,
    Window,
)
from service.domain.thresholds import Threshold
from service.domain.webhooks import MAX_ALLOW_ENTRIES, MAX_URL_CHARS, DeliveryState, WebhookEvent
from service.usecases.registry_plan import DesiredAccount, DesiredTenant
from service.usecases.reports import PolicyReport
from service.usecases.webhook_delivery import TenantDelivery

_URI = {"format": "uri"}
_UNIQUE = {"uniqueItems": True}
"""For the document only: other rules than those of msgspec check these values, with better messages."""
_SecretText = Annotated[str, Meta(description="`whsec_` and base64, shown only once.")]


class WebhookSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """Webhook of a tenant."""

    url: Annotated[
        str,
        Meta(
            max_length=MAX_URL_CHARS,
            description="Receives the events of tasks without a `webhook_url`.",
            extra_json_schema=_URI,
        ),
    ]
    allow: Annotated[
        list[Annotated[str, Meta(max_length=255)]],
        Meta(
            max_length=MAX_ALLOW_ENTRIES,
            description="Hosts allowed in the `webhook_url` of a task, beside that of `url`, and networks such as "
            "10.0.0.0/8: an address that is not public is called only if one of them has it. Each is for the ports 80 "
            "and 443, or for its own: hooks.example:8443, 10.0.0.0/8:8080.",
        ),
    ] = []


class WebhookBody(WebhookSpec, frozen=True):
    """Webhook of a tenant. Without a secret the present one is kept, or one is generated."""

    secret: Annotated[str, Meta(max_length=200, description="`whsec_` and the base64 of 24 to 64 bytes.")] | None = None


class Webhook(WebhookSpec, frozen=True, forbid_unknown_fields=False):
    """Webhook of a tenant."""

    disabled_urls: Annotated[
        list[str], Meta(description="They responded 410. To enable them, set the webhook again.")
    ] = []
    secret: _SecretText | UnsetType = UNSET


class NewSecret(Struct, frozen=True):
    """A generated secret. The previous one also signs until `previous_expires_at`."""

    secret: _SecretText
    previous_expires_at: datetime


class Delivery(Struct, frozen=True):
    """Delivery of a webhook."""

    id: Annotated[str, Meta(description="The `webhook-id`, the same for all attempts.")]
    tenant: str | None
    task: Annotated[str | None, Meta(description="The id of the task; null if it is about a limit.")]
    threshold: Annotated[
        str | None,
        Meta(description="What was reached of a limit; null if it is about a task.", examples=["day-tasks 80%"]),
    ]
    url: Annotated[str, Meta(description="Without its query.")]
    state: DeliveryState
    attempts: Annotated[int, Meta(description="Since the last redelivery.")]
    status: Annotated[int | None, Meta(description="Of the last response.")]
    error: Annotated[str | None, Meta(description="Why the last attempt failed.")]
    answer: Annotated[str | None, Meta(description="Beginning of the last response, if it was no success.")]
    created_at: datetime
    updated_at: datetime
    due_at: Annotated[datetime | None, Meta(description="Time of the next attempt.")]


class DeliveryList(Struct, frozen=True):
    """Failed deliveries, newest first."""

    items: list[Delivery]


class TaskEvent(Struct, frozen=True):
    """Event that a task has ended."""

    type: WebhookEvent
    timestamp: Annotated[datetime, Meta(description="When the task ended.")]
    data: Task


def encode_task_event(task: tasks.Task) -> bytes:
    """Return the body of a webhook, the same bytes for all attempts."""
    event = TaskEvent(
        WebhookEvent.for_state(task.state), to_datetime(task.finished_at or task.updated_at), render_task(task)
    )
    return msgspec.json.encode(event)


class ThresholdEvent(Struct, frozen=True):
    """Event that a tenant has reached a threshold of a limit."""

    type: WebhookEvent
    timestamp: Annotated[datetime, Meta(description="When that was noticed.")]
    data: QuotaThreshold


def encode_threshold_event(tenant: tenants.Tenant, threshold: Threshold, now: int) -> bytes:
    """Return the body of a webhook."""
    data = render_threshold(tenant.name, threshold)
    return msgspec.json.encode(ThresholdEvent(WebhookEvent.QUOTA_THRESHOLD, to_datetime(now), data))


def render_delivery(entry: TenantDelivery) -> Delivery:
    delivery = entry.delivery
    return Delivery(
        id=webhooks.event_id(delivery.id),
        tenant=entry.tenant,
        task=delivery.task_id or None,
        threshold=delivery.threshold,
        url=tenants.strip_query(delivery.url),
        state=delivery.state,
        attempts=delivery.attempts,
        status=delivery.status,
        error=delivery.error,
        answer=delivery.response_excerpt,
        created_at=to_datetime(delivery.created_at),
        updated_at=to_datetime(delivery.updated_at),
        due_at=to_datetime(delivery.next_attempt_at),
    )


_MAX_COUNT = 10**12
_MAX_YUAN = 10**10
MAX_TIMESTAMP = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
Count = Annotated[int, Meta(ge=0, le=_MAX_COUNT)]
YuanInput = Annotated[float, Meta(ge=0, le=_MAX_YUAN, description="Yuan, with at most two decimals.")]


_Note = Annotated[str, Meta(max_length=2_000, description="Free text of the operators.")]


class AccountSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of an account at the upstream."""

    base_url: (
        Annotated[
            str,
            Meta(
                max_length=512,
                description="Of the upstream, if not the default one. A new scheme, host or port needs the `user_key`.",
                extra_json_schema=_URI,
            ),
        ]
        | None
    ) = None
    floor_count: Count = 0
    floor_money: YuanInput = 0
    max_price: Annotated[
        dict[Kind, YuanInput],
        Meta(
            description="The most a task of a kind can cost.",
            extra_json_schema={"propertyNames": {"enum": list(Kind)}},
        ),
    ] = {}
    note: _Note = ""

    def _to_desired(self, name: str, user_key: str | None) -> DesiredAccount:
        """Raises InvalidOptions with all errors, which do not contain the key."""
        errors = ErrorCollector()
        if user_key is not None and not re.fullmatch(r"[!-~]+", user_key):
            errors.add("user_key", "must be printable ASCII without spaces")
        url = errors.collect("", None, _parse_base_url, self.base_url)
        floor = errors.collect("", 0, _to_fen, "floor_money", self.floor_money)
        prices = {kind: errors.collect("max_price", 0, _to_fen, kind, price) for kind, price in self.max_price.items()}
        errors.raise_if_any()
        policy = AccountPolicy(self.floor_count, floor, prices)
        account = tenants.Account(0, name, b"", url, policy, note=self.note)
        return DesiredAccount(account, None if user_key is None else user_key.encode())


class AccountBody(AccountSpec, frozen=True):
    """An account at the upstream. Omitted fields get their defaults; only the key is kept."""

    user_key: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=512,
                description="Of printable ASCII.",
                extra_json_schema={"pattern": "^[!-~]+$"},
            ),
        ]
        | None
    ) = None

    def to_desired(self, name: str) -> DesiredAccount:
        return self._to_desired(name, self.user_key)


class Limit(Struct, frozen=True, forbid_unknown_fields=True):
    """Spending limit in one window of calendar time in UTC."""

    window: Window
    tasks: Count | None = None
    money: YuanInput | None = None
    warn_at: (
        Annotated[
            list[Annotated[int, Meta(ge=1, le=100)]],
            Meta(
                max_length=10,
                description="Percentages of the limit: the first time in a window that so much of the tasks or money "
                "is used, the tenant's webhook receives `quota.threshold`.",
                extra_json_schema=_UNIQUE,
            ),
        ]
        | UnsetType
    ) = UNSET


class TenantSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a tenant."""

    accounts: Annotated[
        list[Name],
        Meta(max_length=100, description="The accounts it may use, in order.", extra_json_schema=_UNIQUE),
    ]
    limits: Annotated[list[Limit], Meta(max_length=len(Window), description="At most one per window.")] = []
    max_active: Count | None = None
    spending_mode: SpendingMode = SpendingMode.COUNT_THEN_MONEY
    kinds: (
        Annotated[list[Kind], Meta(description="The kinds it may submit; all without it.", extra_json_schema=_UNIQUE)]
        | None
    ) = None
    webhook: WebhookSpec | None = None
    state: Annotated[TenantStatus, Meta(description="`read-only` refuses submissions, `disabled` every call.")] = (
        TenantStatus.ACTIVE
    )
    note: _Note = ""
    allow_image_url: Annotated[
        list[Annotated[str, Meta(max_length=255)]],
        Meta(
            max_length=MAX_ALLOW_ENTRIES,
            description="Hosts from which an `image_url` is fetched, none by default, and networks such as 10.0.0.0/8: "
            "an address that is not public is called only if one of them has it. Each is for the ports 80 and 443, or "
            "for its own: images.example:8443. The hosts of redirects must be among them.",
        ),
    ] = []

    def _to_desired(self, name: str, secret: str | None, errors: ErrorCollector) -> DesiredTenant:
        errors.errors += [
            *_find_repeated("accounts", "account", self.accounts),
            *_find_repeated("limits", "window", [limit.window for limit in self.limits]),
            *_find_repeated("kinds", "kind", self.kinds or []),
        ]
        limits = []
        for index, limit in enumerate(self.limits):
            if limit.tasks is None and limit.money is None:
                errors.add(f"limits[{index}]", "must limit tasks, money or both")
            money = errors.collect(f"limits[{index}]", 0, _to_fen, "money", limit.money or 0)
            warn_at = limit.warn_at or []
            errors.errors += _find_repeated(f"limits[{index}].warn_at", "percentage", warn_at)
            money_fen = None if limit.money is None else money
            limits.append(tenants.Limit(limit.window, limit.tasks, money_fen, tuple(sorted(warn_at))))
        webhook = tenants.Webhook()
        if self.webhook:
            url = errors.collect("", "", webhooks.parse_url, "webhook.url", self.webhook.url)
            webhook = tenants.Webhook(
                url, errors.collect("", (), webhooks.parse_allow_list, "webhook.allow", self.webhook.allow)
            )
            errors.collect("", None, webhooks.check_address, "webhook.url", webhook)
        tenant = tenants.Tenant(
            id=0,
            name=name,
            accounts=tuple(self.accounts),
            policy=TenantPolicy(limits=tuple(limits), max_active=self.max_active, spending_mode=self.spending_mode),
            kinds=None if self.kinds is None else tuple(self.kinds),
            state=self.state,
            webhook=webhook,
            note=self.note,
            allow_image_url=errors.collect("", (), webhooks.parse_allow_list, "allow_image_url", self.allow_image_url),
        )
        key = None if secret is None else errors.collect("", b"", webhooks.parse_secret, secret)
        return DesiredTenant(tenant, secret=key)


class TenantBody(TenantSpec, frozen=True, kw_only=True):
    """A tenant. Omitted fields get their defaults."""

    webhook: WebhookBody | None = None

    def to_desired(self, name: str) -> DesiredTenant:
        """Raises InvalidOptions with all errors."""
        errors = ErrorCollector()
        desired = self._to_desired(name, self.webhook.secret if self.webhook else None, errors)
        errors.raise_if_any()
        return desired


class TokenBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a new token."""

    label: Annotated[str, Meta(max_length=200, description="Its purpose.")] | None = None
    expires_at: Annotated[datetime, Meta(tz=True, description="With a time zone.")] | None = None

    def checked_expires_at(self, now: float) -> float | None:
        """Return the expiry time in seconds since the epoch. Raises InvalidOptions if it is past or out of range."""
        seconds = to_seconds("expires_at", self.expires_at)
        if seconds is not None and seconds <= now:
            raise InvalidOptions([FieldError("expires_at", "must be in the future")])
        return seconds


class NewToken(Struct, frozen=True):
    """A generated token. Its text is shown only once."""

    id: str
    token: str
    expires_at: datetime | None


class RevokedTokens(Struct, frozen=True):
    """Tokens that were revoked."""

    revoked: Annotated[list[str], Meta(description="Their ids.")]


class Token(Struct, frozen=True):
    """A token, without its text, of which only the hash is stored."""

    id: str
    label: str | None
    created_at: datetime
    expires_at: datetime | None


class Figure(Struct, frozen=True):
    """A balance, when it was received, and in the response to which call."""

    value: float
    seen_at: datetime | None
    source: ReadingSource


class Account(AccountSpec, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """An account with its state, balance and open submissions."""

    name: str
    state: AccountStatus
    remaining_count: Figure | None
    remaining_money: Figure | None
    look_again_at: datetime | None
    in_flight: Annotated[int, Meta(description="Submissions that have not ended.")]
    unknown: Annotated[int, Meta(description="Submissions that may have been charged.")]
    unexplained: Annotated[
        Amount, Meta(description="Charged by no submission of the gateway, so perhaps by others with the key.")
    ]
    prices: Annotated[dict[Kind, Yuan], Meta(description="Last price of a task, by kind.")]
    live_balance_checks: Annotated[
        bool, Meta(description="Whether checking a finished task again returns the current balance.")
    ]


class AccountList(Struct, frozen=True):
    """All accounts, by name."""

    items: list[Account]


class Tenant(TenantSpec, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A tenant with its use and its tokens."""

    name: str
    webhook: Webhook | None
    policies: list[Policy]
    tokens: list[Token]
    warnings: Annotated[list[str], Meta(description="Questionable settings, such as a limit on money without prices.")]


class TenantList(Struct, frozen=True):
    """All tenants, by name."""

    items: list[Tenant]


def account_spec(account: tenants.Account) -> AccountSpec:
    policy = account.policy
    return AccountSpec(
        base_url=account.base_url,
        floor_count=policy.floor_count,
        floor_money=to_yuan(policy.floor_money_fen),
        max_price={kind: to_yuan(price) for kind, price in policy.max_price.items()},
        note=account.note,
    )


def tenant_spec(tenant: tenants.Tenant) -> TenantSpec:
    webhook, policy = tenant.webhook, tenant.policy
    return TenantSpec(
        accounts=list(tenant.accounts),
        limits=[
            Limit(
                limit.window,
                limit.tasks,
                None if limit.money_fen is None else to_yuan(limit.money_fen),
                list(limit.warn_at) or UNSET,
            )
            for limit in policy.limits
        ],
        max_active=policy.max_active,
        spending_mode=policy.spending_mode,
        kinds=None if tenant.kinds is None else list(tenant.kinds),
        webhook=None if webhook.url is None else WebhookSpec(webhook.url, list(webhook.allow)),
        state=tenant.state,
        note=tenant.note,
        allow_image_url=list(tenant.allow_image_url),
    )


def log_fields(entry: tenants.Account | tenants.Tenant) -> dict[str, Any]:
    """Return the settings of an account or a tenant in the form of the log: URLs without their queries."""
    spec = account_spec(entry) if isinstance(entry, tenants.Account) else tenant_spec(entry)
    fields: dict[str, Any] = msgspec.to_builtins(spec)
    if webhook := fields.get("webhook"):
        webhook["url"] = tenants.strip_query(webhook["url"])
    return fields


def render_account(account: tenants.Account, state: AccountState) -> Account:
    return Account(
        **asdict(account_spec(account)),
        name=account.name,
        state=state.status,
        remaining_count=_render_reading(state.count, int),
        remaining_money=_render_reading(state.money, to_yuan),
        look_again_at=to_datetime(state.next_probe_at) if state.status is AccountStatus.EXHAUSTED else None,
        in_flight=state.open_submissions,
        unknown=state.unknown_outcomes,
        unexplained=Amount(state.unexplained_count, to_yuan(state.unexplained_money_fen)),
        prices={kind: to_yuan(price) for kind, price in state.last_price.items()},
        live_balance_checks=state.live_balance_checks,
    )


def render_tenant(
    tenant: tenants.Tenant,
    tokens: Sequence[tenants.Token],
    policies: Sequence[PolicyReport],
    warnings: Iterable[str],
    secret: str | None = None,
) -> Tenant:
    """Render a tenant, with the secret of its webhook if that was just generated."""
    fields = asdict(tenant_spec(tenant))
    if webhook := fields["webhook"]:
        disabled_urls = list(tenant.webhook.disabled_urls)
        fields["webhook"] = Webhook(webhook.url, webhook.allow, disabled_urls, UNSET if secret is None else secret)
    return Tenant(
        **fields,
        name=tenant.name,
        policies=render_policies(policies),
        tokens=[
            Token(token.id, token.label, seconds_to_datetime(token.created_at), token_expires_at(token))
            for token in tokens
        ],
        warnings=[f"limits {warning}" for warning in warnings],
    )


def token_expires_at(token: tenants.Token) -> datetime | None:
    return None if token.expires_at is None else seconds_to_datetime(token.expires_at)


def seconds_to_datetime(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def to_seconds(field: str, time: datetime | None) -> float | None:
    """Convert to seconds since the epoch. Raises InvalidOptions for years that datetime can't represent."""
    seconds = time.timestamp() if time else None
    if seconds is not None and not 0 <= seconds <= MAX_TIMESTAMP:
        raise InvalidOptions([FieldError(field, "must be between the years 1970 and 9999")])
    return seconds


def _render_reading(reading: BalanceReading | None, convert: Callable[[int], float]) -> Figure | None:
    if reading is None:
        return None
    return Figure(convert(reading.value), to_datetime(reading.received_at), reading.source)


def _to_fen(field: str, amount: float) -> int:
    """Convert yuan to fen. Raises InvalidOptions for fractions of a fen."""
    fen = Decimal(repr(amount)) * FEN_PER_YUAN  # exact: the digits that were sent
    if fen != int(fen):
        raise InvalidOptions([FieldError(field, "must be an amount in yuan with at most two decimals")])
    return int(fen)


def _parse_base_url(url: str | None) -> str | None:
    """Return a base URL without a trailing slash. Raises InvalidOptions."""
    try:
        return None if url is None else parse_base_url(url)
    except ValueError as error:
        raise InvalidOptions([FieldError("base_url", str(error))]) from None


def _find_repeated(field: str, noun: str, values: Sequence[object]) -> Sequence[FieldError]:
    return [FieldError(field, f"must name each {noun} at most once")] if len(set(values)) < len(values) else []


def rename_old_fields(body: Any, errors: ErrorCollector) -> None:
    """Rename the fields of former versions in a tenant, or in all tenants of a registry.

    `purse` is `spending_mode` since 0.3; `disabled`, which refused submissions, is the state `read-only` since 0.4.
    """
    entries = body.get("tenants") if isinstance(body, dict) else None
    places = [("", body)]
    if isinstance(entries, dict):
        places += [(f"{field_path('tenants', name)}.", entry) for name, entry in entries.items()]
    for path, tenant in places:
        for old, new in (("purse", "spending_mode"), ("disabled", "state")):
            if not isinstance(tenant, dict) or old not in tenant:
                continue
            if new in tenant:
                errors.add(f"{path}{old}", f"is the former name of {new}: send only one of them")
            value = tenant.pop(old)
            if old == "disabled":
                if not isinstance(value, bool):
                    errors.add(f"{path}{old}", "must be true or false")
                value = TenantStatus.READ_ONLY.value if value else TenantStatus.ACTIVE.value
            tenant[new] = value


class ClockReset(Struct, frozen=True):
    """Result of a reset of the ledger's time."""

    offset_seconds: Annotated[
        float, Meta(ge=0, description="How far the ledger's time was ahead of the clock of Redis.")
    ]
