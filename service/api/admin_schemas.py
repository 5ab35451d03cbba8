"""JSON of the operators' API."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace

from service.api.schemas import (
    FEN_PER_YUAN,
    Amount,
    Policy,
    Task,
    Yuan,
    render_quota,
    render_task,
    to_datetime,
    to_yuan,
)
from service.domain import tasks, tenants, webhooks
from service.domain.errors import ErrorCollector, FieldError, InvalidOptions, field_path
from service.domain.ledger import AccountState, AccountStatus, BalanceReading, ReadingSource
from service.domain.tasks import Kind
from service.domain.tenants import (
    AccountPolicy,
    Name,
    Registry,
    SecretRef,
    SpendingMode,
    TenantPolicy,
    Window,
)
from service.domain.webhooks import MAX_ALLOW_ENTRIES, MAX_URL_CHARS, DeliveryState, WebhookEvent
from service.usecases import admin
from service.usecases.admin import ReencryptedSecrets, TenantDelivery
from service.usecases.registry_apply import DesiredAccount, DesiredRegistry, DesiredTenant, RegistryPlan
from service.usecases.reports import QuotaReport

_SecretText = Annotated[str, Meta(description="`whsec_` and base64. Shown this once.")]


class WebhookBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a tenant is told of the ends of its tasks. Without a secret it keeps the one it has, or one is made."""

    url: Annotated[str, Meta(max_length=MAX_URL_CHARS, description="By default.")]
    secret: Annotated[str, Meta(max_length=200, description="`whsec_` and the base64 of 24 to 64 bytes.")] | None = None
    allow: Annotated[
        list[Annotated[str, Meta(max_length=255)]],
        Meta(
            max_length=MAX_ALLOW_ENTRIES,
            description="Hosts that a task may name in `webhook_url`, beside that of `url`. They may be at public and "
            "private addresses; networks such as 127.0.0.0/8 let them be at other ones.",
        ),
    ] = []

    def to_webhook(self) -> tenants.Webhook:
        """What it describes, without its secret. Raises InvalidOptions."""
        faults = ErrorCollector()
        url = faults.collect("", self.url, webhooks.parse_url, "webhook.url", self.url)
        allow = faults.collect("", (), webhooks.parse_allow_list, "webhook.allow", self.allow)
        faults.raise_if_any()
        return tenants.Webhook(url, allow)


class Webhook(Struct, frozen=True):
    """Where a tenant is told of the ends of its tasks."""

    url: str
    allow: list[str]
    switched_off: Annotated[list[str], Meta(description="They answered 410. Put the tenant again to send there again.")]
    secret: _SecretText | UnsetType = UNSET


class NewSecret(Struct, frozen=True):
    """A secret that was just made. Until `former_until` the one before signs too."""

    secret: _SecretText
    previous_expires_at: datetime


class Delivery(Struct, frozen=True):
    """How the end of a task was told to its tenant."""

    id: Annotated[str, Meta(description="The `webhook-id`, the same however often it is sent.")]
    tenant: str | None
    task: Annotated[str, Meta(description="The id of the task.")]
    url: Annotated[str, Meta(description="Without its query.")]
    state: DeliveryState
    attempts: Annotated[int, Meta(description="Since it was last sent from the start.")]
    status: Annotated[int | None, Meta(description="Of the last answer.")]
    error: Annotated[str | None, Meta(description="Why the last attempt failed.")]
    answer: Annotated[str | None, Meta(description="How the last answer began, if it was no success.")]
    created_at: datetime
    updated_at: datetime
    due_at: Annotated[datetime | None, Meta(description="When it is tried next.")]


class DeliveryList(Struct, frozen=True):
    """Deliveries that were given up, the newest first."""

    items: list[Delivery]


class TaskEvent(Struct, frozen=True):
    """What a tenant is told when a task has ended."""

    type: WebhookEvent
    timestamp: Annotated[datetime, Meta(description="When the task ended.")]
    data: Task


def encode_task_event(task: tasks.Task) -> bytes:
    """The body that tells of the end of a task: the same bytes whenever it is sent."""
    event = TaskEvent(
        WebhookEvent.for_state(task.state), to_datetime(task.finished_at or task.updated_at), render_task(task)
    )
    return msgspec.json.encode(event)


def render_webhook(webhook: tenants.Webhook, secret: str | None) -> Webhook | None:
    """A webhook as operators see it, with its secret if it was just made."""
    if webhook.url is None:
        return None
    return Webhook(webhook.url, list(webhook.allow), list(webhook.disabled_urls), UNSET if secret is None else secret)


def render_new_secret(generated: admin.NewSecret) -> NewSecret:
    """A secret as it is shown once."""
    return NewSecret(generated.text, datetime.fromtimestamp(generated.previous_expires_at, UTC))


def render_delivery(owned: TenantDelivery) -> Delivery:
    """A delivery as operators see it."""
    found = owned.delivery
    return Delivery(
        id=webhooks.event_id(found.reservation),
        tenant=owned.tenant,
        task=found.task_id,
        url=tenants.strip_query(found.url),
        state=found.state,
        attempts=found.attempts,
        status=found.status,
        error=found.error,
        answer=found.response_excerpt,
        created_at=to_datetime(found.created_at),
        updated_at=to_datetime(found.updated_at),
        due_at=to_datetime(found.next_attempt_at),
    )


_MAX_COUNT = 10**12
_MAX_YUAN = 10**10
MAX_TIMESTAMP = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
Count = Annotated[int, Meta(ge=0, le=_MAX_COUNT)]
YuanInput = Annotated[float, Meta(ge=0, le=_MAX_YUAN, description="Yuan, with at most two decimals.")]


class AccountBody(Struct, frozen=True, forbid_unknown_fields=True):
    """An account at the upstream. What is left out gets its default; only the key is kept."""

    user_key: Annotated[str, Meta(min_length=1, max_length=512, description="Of printable ASCII.")] | None = None
    base_url: Annotated[str, Meta(max_length=512, description="Where the upstream is, if not as usual.")] | None = None
    floor_count: Count = 0
    floor_money: YuanInput = 0
    max_price: Annotated[dict[Kind, YuanInput], Meta(description="The most a task of a kind can cost.")] = {}

    def checked_user_key(self) -> str | None:
        """The key, if one is given. Raises InvalidOptions, without it, for what can't be one."""
        if self.user_key is not None and not re.fullmatch(r"[!-~]+", self.user_key):
            raise InvalidOptions([FieldError("user_key", "must be printable ASCII without spaces")])
        return self.user_key

    def checked_base_url(self) -> str | None:
        """The base address without a slash at its end. Raises InvalidOptions for what is none."""
        if self.base_url is None:
            return None
        if not _is_base_url(self.base_url):
            wanted = "must be a URL such as http://host or https://host/path, without credentials, query or fragment"
            raise InvalidOptions([FieldError("base_url", wanted)])
        return self.base_url.rstrip("/")

    def to_policy(self) -> AccountPolicy:
        """The part that the ledger goes by. Raises InvalidOptions for amounts that are none."""
        faults = ErrorCollector()
        floor = faults.collect("", 0, _to_fen, "floor_money", self.floor_money)
        prices = {kind: faults.collect("max_price", 0, _to_fen, kind, item) for kind, item in self.max_price.items()}
        faults.raise_if_any()
        return AccountPolicy(self.floor_count, floor, prices)


class LimitBody(Struct, frozen=True, forbid_unknown_fields=True):
    """How much may be spent in one window of calendar time in UTC."""

    window: Window
    tasks: Count | None = None
    money: YuanInput | None = None


class TenantBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A tenant. What is left out gets its default."""

    accounts: Annotated[list[Name], Meta(max_length=100, description="The accounts it may use, in order.")]
    limits: Annotated[list[LimitBody], Meta(max_length=len(Window), description="At most one per window.")] = []
    max_active: Count | None = None
    spending_mode: SpendingMode = SpendingMode.COUNT_THEN_MONEY
    kinds: Annotated[list[Kind] | None, Meta(description="The kinds it may submit; all without it.")] = None
    webhook: WebhookBody | None = None
    disabled: bool = False

    def to_tenant(self, name: str) -> tenants.Tenant:
        """The tenant it describes, without its id. Raises InvalidOptions."""
        faults = ErrorCollector()
        faults.errors += [
            *_find_repeated("accounts", "account", self.accounts),
            *_find_repeated("limits", "window", [limit.window for limit in self.limits]),
            *_find_repeated("kinds", "kind", self.kinds or []),
        ]
        limits = []
        for place, limit in enumerate(self.limits):
            if limit.tasks is None and limit.money is None:
                faults.add(f"limits[{place}]", "must limit tasks, money or both")
            money = limit.money and faults.collect(f"limits[{place}]", 0, _to_fen, "money", limit.money)
            limits.append(tenants.Limit(limit.window, limit.tasks, None if money is None else int(money)))
        webhook = faults.collect("", tenants.Webhook(), self.webhook.to_webhook) if self.webhook else tenants.Webhook()
        faults.raise_if_any()
        return tenants.Tenant(
            id=0,
            name=name,
            accounts=tuple(self.accounts),
            policy=TenantPolicy(limits=tuple(limits), max_active=self.max_active, spending_mode=self.spending_mode),
            kinds=None if self.kinds is None else tuple(self.kinds),
            disabled=self.disabled,
            webhook=webhook,
        )


class TokenBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A token to be made."""

    label: Annotated[str, Meta(max_length=200, description="What it is for.")] | None = None
    expires_at: Annotated[datetime, Meta(tz=True, description="With a time zone.")] | None = None

    def checked_expires_at(self, now: float) -> float | None:
        """When it expires, in seconds since the epoch. Raises InvalidOptions if it has, or if no clock will show it."""
        if self.expires_at is None:
            return None
        seconds = self.expires_at.timestamp()
        if not 0 <= seconds <= MAX_TIMESTAMP:
            raise InvalidOptions([FieldError("expires_at", "must be between the years 1970 and 9999")])
        if seconds <= now:
            raise InvalidOptions([FieldError("expires_at", "must lie ahead")])
        return seconds


class NewToken(Struct, frozen=True):
    """A token that was just made. Its text is shown this once."""

    id: str
    token: str
    expires_at: datetime | None


class Token(Struct, frozen=True):
    """A token of which only the hash is kept."""

    id: str
    label: str | None
    created_at: datetime
    expires_at: datetime | None


class Figure(Struct, frozen=True):
    """A figure the upstream told: when, and in the answer to which call."""

    value: int | float
    seen_at: datetime | None
    source: ReadingSource


class Account(Struct, frozen=True):
    """An account: what is known of its balance, whether it is used, and what is under way on it."""

    name: str
    state: AccountStatus
    base_url: str | None
    floor_count: int
    floor_money: Yuan
    max_price: dict[Kind, Yuan]
    remaining_count: Figure | None
    remaining_money: Figure | None
    look_again_at: datetime | None
    in_flight: Annotated[int, Meta(description="Submissions that have not ended.")]
    unknown: Annotated[int, Meta(description="Submissions of which nobody knows whether they were charged.")]
    unexplained: Annotated[Amount, Meta(description="Taken by no submission of the gateway: who else has the key?")]
    prices: Annotated[dict[Kind, Yuan], Meta(description="What a task of each kind last took in money.")]
    looks: Annotated[bool, Meta(description="Whether checking a finished task again tells the balance of now.")]


class AccountList(Struct, frozen=True):
    """All accounts, by name."""

    items: list[Account]


class Tenant(Struct, frozen=True):
    """A tenant: what it may do, what it used, and its tokens."""

    name: str
    accounts: list[str]
    limits: list[Limit]
    max_active: int | None
    spending_mode: SpendingMode
    kinds: list[Kind] | None
    webhook: Webhook | None
    disabled: bool
    policies: list[Policy]
    tokens: list[Token]


class Limit(Struct, frozen=True):
    """What may be spent in one window."""

    window: Window
    tasks: int | None
    money: int | float | None


class TenantList(Struct, frozen=True):
    """All tenants, by name."""

    items: list[Tenant]


def render_account(account: tenants.Account, state: AccountState) -> Account:
    """An account as operators see it."""
    return Account(
        name=account.name,
        state=state.status,
        base_url=account.base_url,
        floor_count=account.policy.floor_count,
        floor_money=to_yuan(account.policy.floor_money_fen),
        max_price={kind: to_yuan(price) for kind, price in account.policy.max_price.items()},
        remaining_count=_render_reading(state.count, 1),
        remaining_money=_render_reading(state.money, FEN_PER_YUAN),
        look_again_at=to_datetime(state.next_probe_at) if state.status is AccountStatus.EXHAUSTED else None,
        in_flight=state.open_submissions,
        unknown=state.unknown_outcomes,
        unexplained=Amount(state.unexplained_count, to_yuan(state.unexplained_money_fen)),
        prices={kind: to_yuan(price) for kind, price in state.last_price.items()},
        looks=state.live_balance_checks,
    )


def render_tenant(
    tenant: tenants.Tenant, tokens: tuple[tenants.Token, ...], report: QuotaReport, secret: str | None = None
) -> Tenant:
    """A tenant as operators see it, with the secret of its webhook if that was just made."""
    limits = tenant.policy.limits
    return Tenant(
        name=tenant.name,
        accounts=list(tenant.accounts),
        limits=[
            Limit(limit.window, limit.tasks, None if limit.money_fen is None else to_yuan(limit.money_fen))
            for limit in limits
        ],
        max_active=tenant.policy.max_active,
        spending_mode=tenant.policy.spending_mode,
        kinds=None if tenant.kinds is None else list(tenant.kinds),
        webhook=render_webhook(tenant.webhook, secret),
        disabled=tenant.disabled,
        policies=render_quota(report).policies,
        tokens=[render_token(token) for token in tokens],
    )


def render_token(token: tenants.Token) -> Token:
    """A token as operators see it."""
    return Token(token.id, token.label, _seconds_to_datetime(token.created_at), token_expires_at(token))


def token_expires_at(token: tenants.Token) -> datetime | None:
    """When a token expires."""
    return None if token.expires_at is None else _seconds_to_datetime(token.expires_at)


def _seconds_to_datetime(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _render_reading(reading: BalanceReading | None, divisor: int) -> Figure | None:
    if reading is None:
        return None
    return Figure(
        reading.value if divisor == 1 else to_yuan(reading.value), to_datetime(reading.received_at), reading.source
    )


def _to_fen(field: str, amount: float) -> int:
    """Yuan as fen. Raises InvalidOptions for fractions of a fen."""
    fen = (
        Decimal(repr(amount)) * FEN_PER_YUAN
    )  # the digits that were sent, and not those of the nearest binary fraction
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


def _find_repeated(field: str, what: str, values: Sequence[str]) -> Sequence[FieldError]:
    return [FieldError(field, f"must name each {what} at most once")] if len(set(values)) < len(values) else []


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
_Timestamp = Annotated[datetime, Meta(tz=True)]
_SecretLocation = Annotated[str, Meta(min_length=1, max_length=4_096)]


class SecretEntry(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A secret by where it is. The gateway remembers that, and takes the secret itself from `value` only."""

    env: Annotated[
        _SecretLocation | None, Meta(description="A variable of the environment of whoever applies this.")
    ] = None
    file: Annotated[_SecretLocation | None, Meta(description="A file there.")] = None
    value: (
        Annotated[str, Meta(max_length=512, description="The secret itself; without it is kept. Never told.")] | None
    ) = None

    def to_secret_ref(self) -> SecretRef | None:
        """Where it is."""
        return SecretRef(self.env, self.file) if self.env or self.file else None


class AccountEntry(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An account at the upstream. What is left out gets its default, but for the id and the key."""

    id: _Id | None = None
    user_key: SecretEntry | None = None
    base_url: Annotated[str, Meta(max_length=512, description="Where the upstream is, if not as usual.")] | None = None
    floor_count: Count = 0
    floor_money: YuanInput = 0
    max_price: Annotated[dict[Kind, YuanInput], Meta(description="The most a task of a kind can cost.")] = {}

    def to_desired(self, name: str, faults: ErrorCollector) -> DesiredAccount:
        """What it describes."""
        where, entry = field_path("accounts", name), self.user_key or SecretEntry()
        body = AccountBody(entry.value, self.base_url, self.floor_count, self.floor_money, self.max_price)
        key = faults.collect(where, None, body.checked_user_key)
        url = faults.collect(where, None, body.checked_base_url)
        policy = faults.collect(where, AccountPolicy(), body.to_policy)
        account = tenants.Account(self.id or 0, name, b"", url, policy, entry.to_secret_ref())
        return DesiredAccount(account, None if key is None else key.encode())


class TokenEntry(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A token, of which only the hash is known."""

    sha256: _Hash
    label: Annotated[str, Meta(max_length=200, description="What it is for.")] | None = None
    created_at: _Timestamp | None = None
    expires_at: _Timestamp | None = None

    def to_token(self, token_id: str, where: str, faults: ErrorCollector) -> tenants.Token:
        """What it describes. Its tenant is to be said yet."""
        where = f"{where}.{field_path('tokens', token_id)}"
        created = faults.collect(where, None, _to_seconds, "created_at", self.created_at) or 0
        expires = faults.collect(where, None, _to_seconds, "expires_at", self.expires_at)
        return tenants.Token(token_id, 0, bytes.fromhex(self.sha256), self.label, created, expires)


class WebhookEntry(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a tenant is told of the ends of its tasks."""

    url: Annotated[str, Meta(max_length=MAX_URL_CHARS)]
    allow: Annotated[list[Annotated[str, Meta(max_length=255)]], Meta(max_length=MAX_ALLOW_ENTRIES)] = []
    secret: SecretEntry | None = None


class TenantEntry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A tenant and its tokens. What is left out gets its default, but for the id and the secret."""

    id: _Id | None = None
    accounts: Annotated[list[Name], Meta(max_length=100, description="The accounts it may use, in order.")]
    limits: Annotated[list[LimitBody], Meta(max_length=len(Window), description="At most one per window.")] = []
    max_active: Count | None = None
    spending_mode: SpendingMode = SpendingMode.COUNT_THEN_MONEY
    kinds: Annotated[list[Kind] | None, Meta(description="The kinds it may submit; all without it.")] = None
    webhook: WebhookEntry | None = None
    disabled: bool = False
    tokens: Annotated[dict[_TokenId, TokenEntry], Meta(description="By their ids.")] = {}

    def to_desired(self, name: str, faults: ErrorCollector) -> DesiredTenant:
        """What it describes."""
        where, told = field_path("tenants", name), self.webhook
        entry = told.secret if told and told.secret else SecretEntry()
        body = TenantBody(
            accounts=self.accounts,
            limits=self.limits,
            max_active=self.max_active,
            spending_mode=self.spending_mode,
            kinds=self.kinds,
            webhook=WebhookBody(told.url, entry.value, told.allow) if told else None,
            disabled=self.disabled,
        )
        tenant = faults.collect(where, tenants.Tenant(0, name, ()), body.to_tenant, name)
        secret = faults.collect(where, b"", webhooks.parse_secret, entry.value) if entry.value is not None else None
        tokens = tuple(token.to_token(token_id, where, faults) for token_id, token in self.tokens.items())
        return DesiredTenant(replace(tenant, id=self.id or 0), tokens, secret, entry.to_secret_ref())


class RegistryBody(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The whole registry but for its history: accounts and tenants by their names."""

    accounts: dict[Name, AccountEntry] = {}
    tenants: dict[Name, TenantEntry] = {}

    def to_desired(self, *, prune: bool) -> DesiredRegistry:
        """What it describes. Raises InvalidOptions with all faults."""
        faults = ErrorCollector()
        accounts = tuple(account.to_desired(name, faults) for name, account in self.accounts.items())
        tenants = tuple(tenant.to_desired(name, faults) for name, tenant in self.tenants.items())
        faults.raise_if_any()
        return DesiredRegistry(accounts, tenants, prune)


JsonValue = dict[str, Any] | list[Any] | str | bool | float | None
"""A part of the registry, however small."""


class DifferenceKind(StrEnum):
    """What is different somewhere."""

    ADDED = "added"
    CHANGED = "changed"
    REMOVED = "removed"


class Difference(Struct, frozen=True, omit_defaults=True):
    """What is different at one place; of secrets only that they are."""

    path: Annotated[str, Meta(examples=["tenants.shop.max_active"])]
    action: DifferenceKind
    before: Annotated[JsonValue, Meta(description="Absent if there was nothing.")] = None
    after: Annotated[JsonValue, Meta(description="Absent if there is nothing any more.")] = None


class ApplyResult(Struct, frozen=True):
    """How the registry became, or would become, what was sent."""

    applied: Annotated[bool, Meta(description="False for a dry run, and if there was nothing to do.")]
    differences: list[Difference]
    unmanaged: Annotated[
        list[str], Meta(description="What was not sent and is there all the same: `prune` removes it.")
    ]
    generated_secrets: Annotated[
        dict[str, str], Meta(description="Webhook secrets that were made, by tenant. They are shown this once.")
    ]


class ReencryptResult(Struct, frozen=True):
    """What was sealed with the first of the secret keys."""

    accounts: Annotated[list[str], Meta(description="Whose keys were sealed anew.")]
    tenants: Annotated[list[str], Meta(description="Whose webhook secrets were sealed anew.")]
    lost: Annotated[
        list[str],
        Meta(description="What no secret key opens, and is as it was.", examples=[["accounts.main.user_key"]]),
    ]


def render_registry(registry: Registry, now: float) -> RegistryBody:
    """The registry as it is at a time (seconds since the epoch), by name; without tokens that have expired."""
    tokens = defaultdict[int, list[tenants.Token]](list)
    for token in sorted(registry.tokens.values(), key=lambda item: (item.created_at, item.id)):
        if token.is_valid_at(now):
            tokens[token.tenant].append(token)
    return RegistryBody(
        {name: _account_entry(account) for name, account in sorted(registry.accounts.items())},
        {name: _tenant_entry(tenant, tokens[tenant.id]) for name, tenant in sorted(registry.tenants.items())},
    )


def render_apply_result(plan: RegistryPlan, differences: list[Difference], *, dry_run: bool) -> ApplyResult:
    """A plan as operators see it."""
    applied = plan.change is not None and not dry_run
    return ApplyResult(applied, differences, list(plan.unmanaged), dict(plan.generated_secrets) if applied else {})


def render_reencrypt_result(reencrypted: ReencryptedSecrets) -> ReencryptResult:
    """What was sealed anew, as operators see it."""
    return ReencryptResult(list(reencrypted.accounts), list(reencrypted.tenants), list(reencrypted.undecryptable))


def _to_seconds(field: str, moment: datetime | None) -> float | None:
    """A moment in seconds since the epoch. Raises InvalidOptions if not every clock can show it."""
    seconds = moment.timestamp() if moment else None
    if seconds is not None and not 0 <= seconds <= MAX_TIMESTAMP:
        raise InvalidOptions([FieldError(field, "must be between the years 1970 and 9999")])
    return seconds


def _account_entry(account: tenants.Account) -> AccountEntry:
    policy = account.policy
    return AccountEntry(
        id=account.id,
        user_key=_secret_entry(account.secret_ref),
        base_url=account.base_url,
        floor_count=policy.floor_count,
        floor_money=to_yuan(policy.floor_money_fen),
        max_price={kind: to_yuan(price) for kind, price in policy.max_price.items()},
    )


def _tenant_entry(tenant: tenants.Tenant, tokens: list[tenants.Token]) -> TenantEntry:
    told, signing = tenant.webhook, tenant.webhook.secrets
    secret = _secret_entry(signing.secret_ref) if signing else None
    return TenantEntry(
        id=tenant.id,
        accounts=list(tenant.accounts),
        limits=[_limit_body(limit) for limit in tenant.policy.limits],
        max_active=tenant.policy.max_active,
        spending_mode=tenant.policy.spending_mode,
        kinds=None if tenant.kinds is None else list(tenant.kinds),
        webhook=None if told.url is None else WebhookEntry(told.url, list(told.allow), secret),
        disabled=tenant.disabled,
        tokens={token.id: _token_entry(token) for token in tokens},
    )


def _limit_body(limit: tenants.Limit) -> LimitBody:
    return LimitBody(limit.window, limit.tasks, None if limit.money_fen is None else to_yuan(limit.money_fen))


def _token_entry(token: tenants.Token) -> TokenEntry:
    expires = None if token.expires_at is None else datetime.fromtimestamp(token.expires_at, UTC)
    return TokenEntry(token.digest.hex(), token.label, datetime.fromtimestamp(token.created_at, UTC), expires)


def _secret_entry(origin: SecretRef | None) -> SecretEntry | None:
    return SecretEntry(origin.env, origin.file) if origin else None


class ClockReset(Struct, frozen=True):
    """What a reset of the ledger's time changed."""

    offset_seconds: Annotated[
        float, Meta(ge=0, description="How far the ledger's time was ahead of the clock of Redis.")
    ]
