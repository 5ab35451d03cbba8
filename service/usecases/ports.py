"""What the use cases need of the world.

Each docstring says what a second implementation must keep. Everything that can't reach its store raises
`LedgerUnavailable`; nothing here retries unless it says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Protocol

import msgspec
from msgspec import Struct

from service.domain.account import AccountState, Figures, Status
from service.domain.registry import Registry
from service.domain.reservation import Idempotency, Refunding, Reservation, ReservationState, Verdict
from service.domain.task import Artifact, Kind, Options, State, Task, TaskError
from service.domain.tenancy import Account, Tenant, Token
from service.domain.usage import DayUsage
from service.domain.windows import TenantState


class Image(Struct, frozen=True):
    """An uploaded image: its bytes, their SHA-256, what they are, and how many pixels they hold."""

    data: bytes
    sha256: bytes
    media_type: str
    width: int
    height: int


class Ask(Struct, frozen=True):
    """A wish to reserve: made once per submission, under an id of the caller's making."""

    reservation: str
    tenant: int
    accounts: tuple[int, ...]
    kind: Kind
    idempotency: Idempotency | None = None


class TaskDraft(Struct, frozen=True):
    """What a new task is told to the ledger with its acceptance."""

    id: str
    options: msgspec.Raw
    metadata: msgspec.Raw


class Settlement(Struct, frozen=True, kw_only=True):
    """The outcome of a reservation, with all that is needed to book it even if the reservation was lost."""

    reservation: str
    tenant: int
    account: int
    kind: Kind
    created: int
    outcome: ReservationState
    figures: Figures = Figures()
    closes: Status | None = None
    draft: TaskDraft | None = None
    idempotency: Idempotency | None = None
    """As it was asked for, so that the key is kept even if the reservation was lost."""
    late: bool = False
    """Found out by somebody else than the sender, whose own settlement goes first while its lease runs."""


class Snapshot(Struct, frozen=True):
    """A tenant's counters at a moment of the ledger's clock."""

    state: TenantState
    now: int


class Look(Struct, frozen=True):
    """A wish to see an account's balance: by checking the task of `reservation` again, as of `claimed`."""

    account: int
    reservation: str
    claimed: int


class Ledger(Protocol):
    """Holds places and books outcomes. Every call is atomic, and idempotent by the reservation's id."""

    async def reserve(self, ask: Ask) -> tuple[Verdict, Snapshot]:
        """Hold a place, or say who refused; a known idempotency key decides first. The same id gets one place."""
        ...

    async def retarget(self, ask: Ask, left: int, closes: Status | None) -> Verdict:
        """Move the reservation from account `left` to the next of `ask.accounts`; a refusal leaves it there."""
        ...

    async def settle(self, settlement: Settlement) -> bool:
        """Book an outcome; False if a final one was booked before.

        A reservation nobody knows of is booked too if it was accepted, and leaves a tombstone otherwise, which
        refuses it should it arrive later.
        """
        ...

    async def expire(self, most: int) -> int:
        """Settle as unknown up to `most` reservations whose lease ran out; the number settled."""
        ...

    async def counters(self, tenant: int) -> Snapshot:
        """The counters of a tenant; those of an unknown one are zero."""
        ...

    async def accounts(self, ids: Sequence[int]) -> Mapping[int, AccountState]:
        """What is known of each account."""
        ...

    async def reopen(self, account: int) -> None:
        """Forget that an account was closed, and its figures, so that the next submission tries it."""
        ...

    async def look(self, account: int, *, count_only: bool) -> Look | None:
        """Claim the turn to look at an account's balance, if that is due; `count_only` if such a tenant uses it."""
        ...

    async def looked(self, look: Look, figures: Figures) -> None:
        """Take in what a second check of a finished task told; without figures it is not asked again."""
        ...


class Books(Protocol):
    """What submissions became and were charged for."""

    async def submission(self, reservation: str) -> Reservation | None:
        """A submission; None if it is not known (any more)."""
        ...

    async def refund(self, tenant: int, reservation: str, reason: str) -> tuple[Refunding, Reservation] | None:
        """Give back what a submission of a tenant was charged for, once; None if it is not known (any more).

        What was refunded before, has not ended, or cost nothing is left as it is.
        """
        ...

    async def usage(self, tenant: int, days: Sequence[int]) -> Sequence[DayUsage]:
        """What a tenant used on each of the days, which are counted from the epoch. Kept for 13 months."""
        ...

    async def today(self) -> int:
        """The day, counted from the epoch, that it is by the ledger's clock, by which submissions get theirs."""
        ...


class Answered(StrEnum):
    """What a check of a task amounted to."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SILENT = "silent"
    """It was answered, but with nothing about the task: not found, or a null state."""
    UNUSABLE = "unusable"
    """It was answered, but with something that can't be used, as an end without its results."""
    NOTHING = "nothing"
    """It was not answered, or not by the vendor."""


class Check(Struct, frozen=True, kw_only=True):
    """The result of asking the upstream about a task. Settling its balance is part of recording it."""

    answered: Answered
    artifacts: tuple[Artifact, ...] = ()
    error: TaskError | None = None
    figures: Figures = Figures()


class Due(Struct, frozen=True):
    """A task claimed for a check; `claimed` is the ledger's time of the claim, and so of the check."""

    task: Task
    claimed: int


class Page(Struct, frozen=True):
    """Tasks, newest first, and where to go on (None at the end)."""

    tasks: tuple[Task, ...]
    cursor: str | None


class Tasks(Protocol):
    """The tasks the ledger accepted, and which of them are to be checked when."""

    async def get(self, reservation: str) -> tuple[Task, int] | None:
        """A task and the ledger's time now; None if it is not known (any more)."""
        ...

    async def page(
        self, tenant: int, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> Page:
        """A tenant's tasks, newest first. Raises MalformedRequest for a cursor that is none."""
        ...

    async def claim(self, most: int) -> Sequence[Due]:
        """Up to `most` tasks whose check is due, which nobody else gets until their lease runs out."""
        ...

    async def record(self, due: Due, check: Check) -> Task | None:
        """Write what a check said, and when to check again; None if the task had ended or is gone.

        An end is recorded once, with its receipt, and never undone.
        """
        ...


class RegistryChange(Struct, frozen=True, kw_only=True):
    """What is written over and taken out of version `version` of the registry, in one go.

    The version that comes of it is the next one, and later than `later_than`. The names of dropped tenants are kept by
    their ids, beside those of `former`.
    """

    version: int
    next_id: int
    later_than: int = 0
    tenants: tuple[Tenant, ...] = ()
    accounts: tuple[Account, ...] = ()
    tokens: tuple[Token, ...] = ()
    drop_tenants: tuple[Tenant, ...] = ()
    drop_accounts: tuple[Account, ...] = ()
    drop_tokens: tuple[Token, ...] = ()
    former: Mapping[int, str] = {}


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
    def ready(self) -> bool:
        """Whether it was loaded at all."""
        ...

    async def refresh(self) -> None:
        """Take over the newest version."""
        ...


class SubmitOutcome(StrEnum):
    """What became of a submit, as far as money is concerned."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    EXHAUSTED = "exhausted"
    INVALID_ACCOUNT = "invalid-account"
    MISCONFIGURED = "misconfigured"
    """Nothing was sent, since the account's key can't be opened, which no waiting helps."""
    NOT_SENT = "not-sent"
    UNKNOWN = "unknown"


class Submitted(Struct, frozen=True, kw_only=True):
    """The outcome of a submit, with the upstream's task id if accepted and its reason if rejected."""

    outcome: SubmitOutcome
    upstream_id: str = ""
    figures: Figures = Figures()
    reason: str = ""


class Upstream(Protocol):
    """The vendor's API, one verb per operation. Neither call raises for anything the network or the vendor does."""

    async def submit(self, account: Account, options: Options, image: Image, *, seconds: float) -> Submitted:
        """Send an image once, within `seconds` all told. Never sends twice; NOT_SENT only if no connection was made."""
        ...

    async def check(self, account: Account, upstream_id: str) -> Check:
        """Ask about a task."""
        ...


class Clock(Protocol):
    """The time of this process."""

    def now(self) -> float:
        """Seconds since the epoch."""
        ...
