"""The ledger: what is held, what became of it, and what it was charged for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec
from msgspec import Struct

from service.domain.ledger import (
    AccountState,
    DayUsage,
    Figures,
    Idempotency,
    Refunding,
    Reservation,
    ReservationState,
    Status,
    TenantState,
    Verdict,
)
from service.domain.tasks import Kind


class Ask(Struct, frozen=True):
    """A wish to reserve: made once per submission, under an id of the caller's making."""

    reservation: str
    tenant: int
    accounts: tuple[int, ...]
    kind: Kind
    idempotency: Idempotency | None = None


class TaskDraft(Struct, frozen=True):
    """What a new task is told to the ledger with its acceptance; `webhook` is where its end is told.

    `trace` is the context in which its submission was recorded, if it was.
    """

    id: str
    options: msgspec.Raw
    metadata: msgspec.Raw
    webhook: str | None = None
    trace: str | None = None


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
    """A tenant's counters at a moment of the server's clock."""

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

    async def expire(self, most: int) -> Sequence[Settlement]:
        """Settle as unknown up to `most` reservations whose lease ran out; what was booked."""
        ...

    async def counters(self, tenant: int) -> Snapshot:
        """The counters of a tenant; those of an unknown one are zero."""
        ...

    async def counters_of(self, ids: Sequence[int]) -> tuple[Mapping[int, TenantState], int]:
        """The counters of all these tenants, and the server's time."""
        ...

    async def accounts(self, ids: Sequence[int]) -> Mapping[int, AccountState]:
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
        """The day, counted from the epoch, that it is by the server's clock, by which submissions get theirs."""
        ...
