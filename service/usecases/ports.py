"""Interfaces of the stores and clients, and their value types."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
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
    RefundResult,
    Reservation,
    ReservationState,
    TenantState,
    Verdict,
)
from service.domain.tasks import Artifact, ArtifactName, Backlog, Kind, Options, State, Task, TaskError
from service.domain.tenants import Account, Registry, Tenant, Token, Webhook
from service.domain.webhooks import DeliveryState


class Delivery(Struct, frozen=True, kw_only=True):
    """The end of `task`, by its public id, to be told at `url`. Times are milliseconds of the server's clock.

    `due` is when it is tried next, `attempts` counts the tries since it was last sent from the start. Of the last one:
    the `status` of its answer and how that begins, and the `error` if it was no success.
    """

    reservation: str
    task_id: str
    tenant: int
    url: str
    state: DeliveryState
    created_at: int
    updated_at: int
    attempts: int = 0
    next_attempt_at: int | None = None
    status: int | None = None
    error: str | None = None
    response_excerpt: str | None = None


class ClaimedDelivery(Struct, frozen=True):
    """A delivery that is this process's until `leased`, the ledger's time when its lease ends."""

    delivery: Delivery
    lease_expires_at: int


class DeliveryResult(Struct, frozen=True, kw_only=True):
    """What became of a delivery. If it is still pending, it is tried again after `wait` milliseconds.

    It was `attempted` if something was sent, or should have been.
    """

    state: DeliveryState
    attempted: bool = True
    retry_delay_ms: int = 0
    status: int | None = None
    error: str | None = None
    response_excerpt: str | None = None


class DeliveryQueue(Protocol):
    """The deliveries: each end of a task that has a webhook begins one, in the call that records the end."""

    async def claim(self, limit: int) -> Sequence[ClaimedDelivery]:
        """Up to `most` deliveries that are due, which nobody else gets until their lease runs out.

        Of each receiver (a tenant's deliveries to one host) a few at a time, and one alone if it has failed lately:
        the others never wait for it.
        """
        ...

    async def record_attempt(self, claimed: ClaimedDelivery, result: DeliveryResult) -> bool:
        """Write what became of an attempt; False if it had its outcome, or is somebody else's by now.

        What was delivered is delivered, though, whoever has it by now.
        """
        ...

    async def backlog(self) -> tuple[Backlog, int]:
        """How many receivers wait for something, how late the first is, and how many deliveries failed in 30 days."""
        ...

    async def list_failed(self, limit: int) -> Sequence[Delivery]:
        """Up to `most` deliveries that were given up in the last 30 days, the newest first."""
        ...

    async def redeliver(self, reservation: str) -> Delivery | None:
        """Begin a delivery anew, unless it is under way just now; None if it is not known (any more)."""
        ...


class TransferAborted(Exception):
    """The rest of a result can't be had, or there is more of it than there may be: what came is not the result."""


class RangeRequest(Struct, frozen=True, kw_only=True):
    """What of a file is asked for, in HTTP's own words (RFC 9110); `range` is one range of bytes."""

    range: str | None = None
    if_range: str | None = None
    if_none_match: str | None = None
    if_modified_since: str | None = None


class Coverage(StrEnum):
    """How much of a file is given."""

    FULL = "whole"
    PARTIAL = "part"
    NOT_MODIFIED = "nothing"
    """It is still the one that is known."""


class ArtifactStream(Struct, frozen=True, kw_only=True):
    """A file as it comes. `length` in bytes is of what is given, where it is known beforehand.

    What has no description here is in HTTP's own words. `chunks` never holds more than a few of them, so that who reads
    slowly is waited for. It raises BrokenOff.
    """

    name: ArtifactName
    coverage: Coverage
    media_type: str
    chunks: AsyncIterator[bytes]
    length: int | None = None
    content_range: str | None = None
    etag: str | None = None
    last_modified: str | None = None
    accept_ranges: str | None = None


class Artifacts(Protocol):
    """Where results are kept."""

    def fetch(
        self, account: Account | None, artifact: Artifact, range_request: RangeRequest, *, is_recent: bool = False
    ) -> AbstractAsyncContextManager[ArtifactStream]:
        """A result of a task of this account, None if that is gone. The fetch ends with the block at the latest.

        A result that is `recent` may not have arrived where it is kept: until it has, UpstreamUnavailable is raised.

        Goes to public addresses only, and to the account's own upstream. Entering raises UpstreamInvalidResponse,
        UpstreamUnavailable, RangeNotSatisfiable or Overloaded, always before anything is given.
        """
        ...


class WebhookResponse(Struct, frozen=True, kw_only=True):
    """What came of a call: the status of the answer and how that begins, or in `error` why there is none.

    `retry_after` is in how many seconds the receiver wants to be called again.
    """

    status: int | None = None
    retry_after_seconds: float | None = None
    error: str | None = None
    excerpt: str | None = None


class WebhookSender(Protocol):
    """Calls addresses that tenants chose. Never raises for anything that the network or a receiver does."""

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, webhook: Webhook) -> WebhookResponse:
        """Send once, within a time limit, to an address of the host that `webhook` lets be reached.

        The host is resolved and checked anew for every call. Redirects are not followed. Raises Overloaded if this
        machine could not make the call.
        """
        ...


class ReserveRequest(Struct, frozen=True):
    """A wish to reserve: made once per submission, under an id of the caller's making."""

    reservation: str
    tenant: int
    accounts: tuple[int, ...]
    kind: Kind
    idempotency: Idempotency | None = None


class NewTask(Struct, frozen=True):
    """What a new task is told to the ledger with its acceptance; `webhook` is where its end is told.

    `trace` is the context in which its submission was recorded, if it was.
    """

    id: str
    options: msgspec.Raw
    metadata: msgspec.Raw
    webhook_url: str | None = None
    trace_context: str | None = None


class Settlement(Struct, frozen=True, kw_only=True):
    """The outcome of a reservation, with all that is needed to book it even if the reservation was lost."""

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
    """As it was asked for, so that the key is kept even if the reservation was lost."""
    is_late: bool = False
    """Found out by somebody else than the sender, whose own settlement goes first while its lease runs."""


class TenantSnapshot(Struct, frozen=True):
    """A tenant's counters at a moment of the server's clock."""

    state: TenantState
    now: int


class BalanceCheck(Struct, frozen=True):
    """A wish to see an account's balance: by checking the task of `reservation` again, as of `claimed`."""

    account: int
    reservation: str
    claimed_at: int


class Ledger(Protocol):
    """Holds places and books outcomes. Every call is atomic, and idempotent by the reservation's id."""

    async def reserve(self, request: ReserveRequest) -> tuple[Verdict, TenantSnapshot]:
        """Hold a place, or say who refused; a known idempotency key decides first. The same id gets one place."""
        ...

    async def change_account(
        self, request: ReserveRequest, previous: int, account_status: AccountStatus | None
    ) -> Verdict:
        """Move the reservation from account `left` to the next of `ask.accounts`; a refusal leaves it there."""
        ...

    async def settle(self, settlement: Settlement) -> bool:
        """Book an outcome; False if a final one was booked before.

        A reservation nobody knows of is booked too if it was accepted, and leaves a tombstone otherwise, which
        refuses it should it arrive later.
        """
        ...

    async def settle_expired(self, limit: int) -> Sequence[Settlement]:
        """Settle as unknown up to `most` reservations whose lease ran out; what was booked."""
        ...

    async def tenant_snapshot(self, tenant: int) -> TenantSnapshot:
        """The counters of a tenant; those of an unknown one are zero."""
        ...

    async def tenant_states(self, ids: Sequence[int]) -> tuple[Mapping[int, TenantState], int]:
        """The counters of all these tenants, and the server's time."""
        ...

    async def account_states(self, ids: Sequence[int]) -> Mapping[int, AccountState]:
        """What is known of each account, with all times in the server's time."""
        ...

    async def clock_offset(self) -> int:
        """By how many milliseconds the ledger's time is ahead of the server's: 0 unless that has stepped back."""
        ...

    async def reset_clock(self, tenants: Sequence[int], accounts: Sequence[int]) -> int:
        """Make the ledger's time the server's again, and with it all that is due; by how many milliseconds.

        `tenants` and `accounts` are all there are: what is known of them is kept in the ledger's time too.
        """
        ...

    async def reopen_account(self, account: int) -> None:
        """Forget that an account was closed, and its figures, so that the next submission tries it."""
        ...

    async def claim_balance_check(self, account: int, *, count_only: bool) -> BalanceCheck | None:
        """Claim the turn to look at an account's balance, if that is due; `count_only` if such a tenant uses it."""
        ...

    async def record_balance_check(self, check: BalanceCheck, balance: Balance) -> None:
        """Take in what a second check of a finished task told; without figures it is not asked again."""
        ...

    async def get_reservation(self, reservation: str) -> Reservation | None:
        """A submission; None if it is not known (any more)."""
        ...

    async def refund(self, tenant: int, reservation: str, reason: str) -> tuple[RefundResult, Reservation] | None:
        """Give back what a submission of a tenant was charged for, once; None if it is not known (any more).

        What was refunded before, has not ended, or cost nothing is left as it is.
        """
        ...

    async def get_usage(self, tenant: int, days: Sequence[int]) -> Sequence[DayUsage]:
        """What a tenant used on each of the days, which are counted from the epoch. Kept for 13 months."""
        ...

    async def current_day(self) -> int:
        """The day, counted from the epoch, that it is by the server's clock, by which submissions get theirs."""
        ...


class RegistryChange(Struct, frozen=True, kw_only=True):
    """What is written over and taken out of version `version` of the registry, in one go.

    The version that comes of it is the next one, and later than `later_than`. The names of dropped tenants are kept by
    their ids, beside those of `former`.
    """

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
    """Where the registry is kept."""

    async def write(self, change: RegistryChange) -> bool:
        """Carry out a change; False, with nothing done, if `change.version` is no longer the newest."""
        ...


class RegistryView(Protocol):
    """The registry as this process holds it in memory: reading `current` never waits."""

    @property
    def current(self) -> Registry:
        """The version held now."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether it was loaded at all."""
        ...

    async def refresh(self) -> None:
        """Take over the newest version."""
        ...


class Image(Struct, frozen=True):
    """An uploaded image: its bytes, their SHA-256, what they are, and how many pixels they hold."""

    data: bytes
    sha256: bytes
    media_type: str
    width: int
    height: int


class CheckOutcome(StrEnum):
    """What a check of a task amounted to."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    NOT_FOUND = "not_found"
    """It was answered, but with nothing about the task: not found, or a null state."""
    INVALID = "invalid"
    """It was answered, but with something that can't be used, as an end without its results."""
    NO_RESPONSE = "no_response"
    """It was not answered, or not by the vendor."""


class CheckResult(Struct, frozen=True, kw_only=True):
    """The result of asking the upstream about a task. Settling its balance is part of recording it."""

    outcome: CheckOutcome
    artifacts: tuple[Artifact, ...] = ()
    error: TaskError | None = None
    balance: Balance = Balance()


class SubmitOutcome(StrEnum):
    """What became of a submit, as far as money is concerned."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    EXHAUSTED = "exhausted"
    INVALID_ACCOUNT = "invalid-account"
    MISCONFIGURED = "misconfigured"
    """Nothing was sent, since the account's key can't be opened, which no waiting helps."""
    REDIRECTED = "redirected"
    """Refused with a redirect, which is not followed: the base address of the account is wrong."""
    BUSY = "busy"
    """Refused for now with HTTP 429."""
    NOT_SENT = "not-sent"
    UNKNOWN = "unknown"


class SubmitResult(Struct, frozen=True, kw_only=True):
    """The outcome of a submit, with the upstream's task id if accepted and its reason if rejected.

    `reason_en` is the reason in English, for reasons that are known.
    `retry_after` is in seconds, where a busy upstream names them.
    """

    outcome: SubmitOutcome
    upstream_id: str = ""
    balance: Balance = Balance()
    reason: str = ""
    reason_en: str | None = None
    retry_after_seconds: float | None = None


class Upstream(Protocol):
    """The vendor's API, one verb per operation. Neither call raises for anything the network or the vendor does."""

    async def submit(self, account: Account, options: Options, image: Image, *, timeout_seconds: float) -> SubmitResult:
        """Send an image once, within `seconds` all told. Never sends twice; NOT_SENT only if no connection was made."""
        ...

    async def check(self, account: Account, upstream_id: str) -> CheckResult:
        """Ask about a task."""
        ...


class ClaimedCheck(Struct, frozen=True):
    """A task claimed for a check that was `due` then; `claimed` is the time of the claim, and so of the check.

    Both are the ledger's time.
    """

    task: Task
    claimed_at: int
    due_at: int


class TaskPage(Struct, frozen=True):
    """Tasks, newest first, and where to go on (None at the end)."""

    tasks: tuple[Task, ...]
    next_cursor: str | None


class TaskStore(Protocol):
    """The tasks the ledger accepted, and which of them are to be checked when."""

    async def get(self, reservation: str) -> tuple[Task, int] | None:
        """A task and the server's time now; None if it is not known (any more)."""
        ...

    async def touch(self, reservations: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        """As `get`, for somebody who looks at tasks or waits for them: they are checked often for a while."""
        ...

    async def list_page(
        self, tenant: int, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> TaskPage:
        """A tenant's tasks, newest first. Raises MalformedRequest for a cursor that is none."""
        ...

    async def claim_checks(self, limit: int) -> Sequence[ClaimedCheck]:
        """Up to `most` tasks whose check is due, which nobody else gets until their lease runs out."""
        ...

    async def backlog(self) -> Backlog:
        """How many tasks are watched, and how late the first check is that nobody has claimed."""
        ...

    async def record_check(self, claimed: ClaimedCheck, result: CheckResult) -> tuple[Task, int] | None:
        """Write what a check said, and when to check again; the task and the time now, None if it had ended or is gone.

        An end is recorded once, with its receipt, and never undone. What can be seen of a task is announced.
        """
        ...
