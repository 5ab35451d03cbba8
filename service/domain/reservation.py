"""A submission's place in the books, and what can become of it.

Times are milliseconds of the ledger's clock, money is in fen.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct, field

from service.domain.balance import AccountState, Before, Figures
from service.domain.task import Kind
from service.domain.tenancy import AccountPolicy, Window


class ReservationState(StrEnum):
    """What became of a reservation. `reserved` is open, `unknown` provisional, the others are final."""

    RESERVED = "reserved"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    NOT_SENT = "not-sent"
    UNKNOWN = "unknown"


class Reservation(Struct):
    """A place held in the windows of a tenant and on an account, until `lease`.

    `sent` is when it was last aimed at an account; `before` what was known of that account then, `alone` whether
    nothing else was open on it, `seq` its number there. `ended` says that its task has ended and its receipt is booked.
    """

    state: ReservationState
    tenant: int
    account: int
    kind: Kind
    created: int
    sent: int
    lease: int
    seq: int = 0
    alone: bool = False
    ended: bool = False
    before: Before | None = None
    after: Figures | None = None
    periods: dict[Window, int] = field(default_factory=dict)
    holds: dict[Window, int] = field(default_factory=dict)


class Violation(Struct, frozen=True):
    """A policy that refused: its name, its limit, and when it resets (None if it never does by itself)."""

    policy: str
    limit: int
    resets_at: int | None


class Candidate(Struct):
    """An account that a submission may use."""

    id: int
    policy: AccountPolicy
    state: AccountState


class Granted(Struct, frozen=True):
    """A place is held on `account` until `lease`."""

    account: int
    now: int
    lease: int


class PolicyDenied(Struct, frozen=True):
    """Policies of the tenant refused."""

    violations: tuple[Violation, ...]
    now: int


class NoAccount(Struct, frozen=True):
    """No account can take it: all are exhausted until `look_at`, or (if None) none is valid."""

    look_at: int | None
    now: int


Verdict = Granted | PolicyDenied | NoAccount
