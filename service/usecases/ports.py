"""Interfaces of the stores and clients, and their value types.

Calls that can't reach their store raise LedgerUnavailable; nothing is retried unless stated.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from typing import Protocol

import msgspec
from msgspec import Struct

from service.domain.ledger import (
    AccountState,
    AccountStatus,
    Balance,
    DayUsage,
    Idempotency,
    InFlight,
    RefundResult,
    Replay,
    Reservation,
    ReservationState,
    SpentSums,
    TenantState,
    Verdict,
)
from service.domain.tasks import Artifact, ArtifactName, Backlog, Kind, Options, State, Task, TaskError
from service.domain.tenants import Account, Registry, Tenant, Token
from service.domain.thresholds import Threshold
from service.domain.webhooks import DeliveryState


class Delivery(Struct, frozen=True, kw_only=True):
    """An event to be sent to `url`. Times are milliseconds of server time.

    That of a task is its end, under the id of its reservation. That of a limit has the name of the `threshold` and the
    `body`, and no `task_id`. `attempts` counts since the last (re)delivery; `status`, `error` and `response_excerpt`
    are those of the last attempt.
    """

    id: str
    task_id: str
    tenant: int
    url: str
    threshold: str | None = None
    body: str | None = None
    state: DeliveryState
    created_at: int
    updated_at: int
    attempts: int = 0
    next_attempt_at: int | None = None
    status: int | None = None
    error: str | None = None
    response_excerpt: str | None = None


class ClaimedDelivery(Struct, frozen=True):
    """A delivery leased by this process, in ledger time."""

    delivery: Delivery
    lease_expires_at: int


class DeliveryResult(Struct, frozen=True, kw_only=True):
    """The result of a delivery; PENDING is retried after the delay.

    `attempted` is False if nothing was or should have been sent.
    """

    state: DeliveryState
    attempted: bool = True
    retry_delay_ms: int = 0
    status: int | None = None
    error: str | None = None
    response_excerpt: str | None = None


class DeliveryQueue(Protocol):
    """Deliveries; recording the end of a task with a webhook URL creates one."""

    async def queue_threshold(self, name: str, tenant: int, url: str, threshold: Threshold, body: bytes) -> bool:
        """Create the delivery `name` of a threshold, once per window, and again after its limit was raised.

        Returns False if that was done before, or the tenant was deleted.
        """

    async def claim(self, limit: int) -> Sequence[ClaimedDelivery]:
        """Lease up to `limit` due deliveries.

        Few at a time of each queue (a tenant's deliveries to one host), one if it failed lately: no queue delays
        another.
        """

    async def record_attempt(self, claimed: ClaimedDelivery, result: DeliveryResult) -> bool:
        """Record a result; return False if there is a final one or the lease was lost. DELIVERED is recorded anyway."""

    async def backlog(self) -> tuple[Backlog, int]:
        """Return the backlog of queues, and the number of deliveries that failed in the last 30 days."""

    async def list_failed(self, limit: int) -> Sequence[Delivery]:
        """Return up to `limit` deliveries that failed in the last 30 days, newest first."""

    async def redeliver(self, delivery: str) -> Delivery | None:
        """Restart a delivery unless it is in progress; None if it is unknown."""


class TransferAborted(Exception):
    """The rest of a result is unavailable or too long: the received part is not the result."""


class RangeRequest(Struct, frozen=True, kw_only=True):
    """Request headers of RFC 9110 for a file; `range` is one range of bytes."""

    range: str | None = None
    if_range: str | None = None
    if_none_match: str | None = None
    if_modified_since: str | None = None


class Coverage(StrEnum):
    FULL = "full"
    PARTIAL = "partial"
    NOT_MODIFIED = "not-modified"


class ArtifactStream(Struct, frozen=True, kw_only=True):
    """A file with its response headers. Its `chunks` are read on demand and raise TransferAborted."""

    name: ArtifactName
    coverage: Coverage
    media_type: str
    chunks: AsyncIterator[bytes]
    length: int | None = None
    content_range: str | None = None
    etag: str | None = None
    last_modified: str | None = None
    accept_ranges: str | None = None


class ImageStream(Struct, frozen=True):
    """An image that is being fetched: its announced length in bytes, and chunks that are read on demand."""

    length: int | None
    chunks: AsyncIterator[bytes]


FetchImage = Callable[[str, Tenant], AbstractAsyncContextManager[ImageStream]]
"""Opens the image at a URL that the tenant may name. Entering, and reading its chunks, raise ImageUnreachable and
Overloaded."""


class WebhookResponse(Struct, frozen=True, kw_only=True):
    """The response to a webhook, or in `error` why there is none."""

    status: int | None = None
    retry_after_seconds: float | None = None
    error: str | None = None
    excerpt: str | None = None


class ReserveRequest(Struct, frozen=True):
    """A request to reserve, once per submission, with a generated id."""

    reservation: str
    tenant: int
    accounts: tuple[int, ...]
    kind: Kind
    idempotency: Idempotency | None = None


class NewTask(Struct, frozen=True):
    """The part of an acceptance that becomes the task."""

    id: str
    options: msgspec.Raw
    metadata: msgspec.Raw
    webhook_url: str | None = None
    trace_context: str | None = None


class Settlement(Struct, frozen=True, kw_only=True):
    """The outcome of a reservation, complete even if Redis lost the reservation."""

    reservation: str
    tenant: int
    account: int
    kind: Kind
    created_at: int
    outcome: ReservationState
    balance: Balance = Balance()
    account_status: AccountStatus | None = None
    new_task: NewTask | None = None
    idempotency: Idempotency | None = None
    is_late: bool = False
    """Not by the sender, whose own settlement goes first while its lease is valid."""


class TenantSnapshot(Struct, frozen=True):
    """A tenant's counters, and the server time."""

    state: TenantState
    now: int


class TenantFigures(Struct, frozen=True):
    """A tenant's counters, and what its usage charges, for each kind that was charged for."""

    state: TenantState
    spent: Mapping[Kind, SpentSums]


class BalanceCheck(Struct, frozen=True):
    """A claimed check of a finished task that reads the balance of its account."""

    account: int
    reservation: str
    claimed_at: int


class Ledger(Protocol):
    """Reservations, settlements, balances and usage. Calls are atomic, and idempotent by the reservation id."""

    async def reserve(self, request: ReserveRequest) -> tuple[Verdict, TenantSnapshot]:
        """Reserve, or return who refused. A known idempotency key decides first; a repeated id reserves once."""

    async def change_account(
        self, request: ReserveRequest, previous: int, account_status: AccountStatus | None
    ) -> Verdict:
        """Move a reservation from account `previous` to the next of the request; a refusal leaves it in place."""

    async def settle(self, settlement: Settlement) -> bool:
        """Settle; return False if there is a final outcome.

        An unknown reservation is recreated if accepted; otherwise a tombstone refuses it should it arrive later.
        """

    async def settle_expired(self, limit: int) -> Sequence[Settlement]:
        """Settle up to `limit` reservations with expired leases as unknown."""

    async def find_replay(
        self, tenant: int, idempotency: Idempotency
    ) -> tuple[Replay | InFlight | None, TenantSnapshot]:
        """Find an earlier submission under the same key whose image had the same URL, without a reservation."""

    async def tenant_snapshot(self, tenant: int) -> TenantSnapshot: ...

    async def tenant_figures(self, ids: Sequence[int]) -> tuple[Mapping[int, TenantFigures], int]:
        """Return the figures of tenants, and the server time."""

    async def account_states(self, ids: Sequence[int]) -> Mapping[int, AccountState]:
        """Return the states of accounts; times are server time."""

    async def clock_offset(self) -> int:
        """Return how far ledger time is ahead of server time, in milliseconds."""

    async def reset_clock(self, tenants: Sequence[int], accounts: Sequence[int]) -> int:
        """Set ledger time to server time, with all due times; return the former offset.

        Takes the ids of all tenants and accounts, whose states hold ledger times.
        """

    async def reopen_account(self, account: int) -> None:
        """Forget that an account was closed, and its balance, so that the next submission tries it."""

    async def claim_balance_check(self, account: int, *, count_only: bool) -> BalanceCheck | None:
        """Claim a balance check if one is due; `count_only` if a tenant of that mode uses the account."""

    async def record_balance_check(self, check: BalanceCheck, balance: Balance) -> None:
        """Record a balance check; without figures the task is not checked again."""

    async def get_reservation(self, reservation: str) -> Reservation | None: ...

    async def refund(self, tenant: int, reservation: str, reason: str) -> tuple[RefundResult, Reservation] | None:
        """Refund a submission once, unless it has not ended or cost nothing; None if it is unknown."""

    async def get_usage(self, tenant: int, days: Sequence[int]) -> Sequence[DayUsage]:
        """Return the usage of a tenant on days since the epoch, for the last 13 months."""

    async def sum_usage(self, tenant: int, first: int, last: int) -> Mapping[int, DayUsage]:
        """Sum the usage from one day since the epoch to another, at most a month.

        Returns all tallies for `first`, and the named submissions for their own days.
        """

    async def current_day(self) -> int:
        """Return the current day since the epoch, by server time."""


class RegistryChange(Struct, frozen=True, kw_only=True):
    """An atomic change of one version of the registry; the next version is greater than `newer_than`."""

    version: int
    next_id: int
    newer_than: int = 0
    tenants: tuple[Tenant, ...] = ()
    accounts: tuple[Account, ...] = ()
    tokens: tuple[Token, ...] = ()
    drop_tenants: tuple[Tenant, ...] = ()
    drop_accounts: tuple[Account, ...] = ()
    drop_tokens: tuple[Token, ...] = ()
    deleted_tenant_names: Mapping[int, str] = {}


class RegistryStore(Protocol):
    async def load(self) -> Registry: ...

    async def read_version(self) -> int: ...

    async def write(self, change: RegistryChange) -> bool:
        """Write a change; return False if its version is no longer the latest."""


class Image(Struct, frozen=True):
    data: bytes
    sha256: bytes
    media_type: str
    width: int
    height: int


class CheckOutcome(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    NOT_FOUND = "not_found"
    """A response without information on the task: not found, or a null state."""
    INVALID = "invalid"
    """An unusable response, such as an end without results."""
    NO_RESPONSE = "no_response"
    """No response, or not from the vendor."""


class CheckResult(Struct, frozen=True, kw_only=True):
    outcome: CheckOutcome
    artifacts: tuple[Artifact, ...] = ()
    error: TaskError | None = None
    balance: Balance = Balance()


class SubmitOutcome(StrEnum):
    """The outcome of a submission, as far as money is concerned."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    EXHAUSTED = "exhausted"
    INVALID_ACCOUNT = "invalid-account"
    MISCONFIGURED = "misconfigured"
    """Not sent: the account's key can't be decrypted for its base URL."""
    REDIRECTED = "redirected"
    """Refused with a redirect, which is not followed: the base URL is wrong."""
    BUSY = "busy"
    """Refused with HTTP 429."""
    NOT_SENT = "not-sent"
    UNKNOWN = "unknown"


class SubmitResult(Struct, frozen=True, kw_only=True):
    """The result of a submission: the upstream's task id, or its reason (`reason_en`: in English, if known)."""

    outcome: SubmitOutcome
    upstream_id: str = ""
    balance: Balance = Balance()
    reason: str = ""
    reason_en: str | None = None
    retry_after_seconds: float | None = None


class Upstream(Protocol):
    """The vendor's API. Calls raise nothing for what the network or the vendor does."""

    async def submit(self, account: Account, options: Options, image: Image, *, timeout_seconds: float) -> SubmitResult:
        """Send an image once, within the timeout; NOT_SENT only if no connection was made."""

    async def check(self, account: Account, upstream_id: str) -> CheckResult: ...


class ClaimedCheck(Struct, frozen=True):
    """A task leased for a check; times are ledger time."""

    task: Task
    claimed_at: int
    due_at: int


class TaskPage(Struct, frozen=True):
    tasks: tuple[Task, ...]
    next_cursor: str | None


class TaskStore(Protocol):
    """Accepted tasks, and when to check them."""

    async def get(self, reservation: str) -> tuple[Task, int] | None:
        """Return a task and the server time; None if it is unknown."""

    async def touch(
        self, reservations: Sequence[str], *, is_awaited: bool = False
    ) -> Sequence[tuple[Task, int] | None]:
        """As `get`, and check the tasks often for a while: a client reads them.

        If a client awaits them, their next check precedes those of others; repeated once per check interval.
        """

    async def list_page(
        self, tenant: int, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> TaskPage:
        """List a tenant's tasks, newest first. Raises MalformedRequest for an invalid cursor."""

    async def claim_checks(self, limit: int) -> Sequence[ClaimedCheck]:
        """Lease up to `limit` tasks whose check is due, first those that a client awaits."""

    async def backlog(self) -> Backlog: ...

    async def record_check(self, claimed: ClaimedCheck, result: CheckResult) -> tuple[Task, int] | None:
        """Record a check and schedule the next; return the task and the server time, None if it had ended or is
        unknown.

        An end is recorded once, with its cost. Visible changes are published.
        """

    async def record_running(self, claimed: Sequence[ClaimedCheck]) -> Sequence[tuple[Task, int]]:
        """As `record_check` does for each, record checks with outcome RUNNING. Return what changed visibly."""

    async def release_checks(self, claimed: Sequence[ClaimedCheck]) -> None:
        """End the leases of checks that were not made: they are due at once."""
