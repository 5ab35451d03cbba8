"""A submission's place in the books, and what can become of it.

Times are milliseconds in the ledger's time, money is in fen; `created`, the periods and a refund are in the server's.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec
from msgspec import Struct, field

from service.domain.account import AccountState, Before, Figures, Suggestion
from service.domain.task import Cost, Kind
from service.domain.tenancy import AccountPolicy, Window


class ReservationState(StrEnum):
    """What became of a reservation. `reserved` is open, `unknown` provisional, the others are final."""

    RESERVED = "reserved"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    NOT_SENT = "not-sent"
    UNKNOWN = "unknown"


class Idempotency(Struct, frozen=True):
    """What makes a repeated submission known: digests of the key and of the content it was first sent with."""

    key: str
    content: str


class Refund(Struct):
    """What an operator gave back to the tenant's windows, when (ms) and why."""

    at: int
    reason: str
    count: int
    money: int


class Reservation(Struct):
    """A place held in the windows of a tenant and on an account, until `lease`.

    `sent` is when it was last aimed at an account; `before` what was known of that account then, `alone` whether
    nothing else was open on it, `clean` whether those figures lacked nothing, `seq` its number there. `use` says
    whether it was to take a prepaid use, or money (None where nobody knew). It `owes` while it may not be in the
    figures, and is `thrifty` while it is under way and must not take money.

    `settled` is when it got its outcome. `cost` is what its task took and `succeeded` how it went, known once that has
    ended. `key` is the digest of its idempotency key. Of an unknown outcome `suggests` says what the balance suggests.
    A `refund` makes it count for nothing in the windows, whatever else becomes of it. `periods` are the keys of the
    counters it was counted in.
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
    clean: bool = False
    use: bool | None = None
    owes: bool = False
    thrifty: bool = False
    settled: int = 0
    before: Before | None = None
    after: Figures | None = None
    cost: Cost | None = None
    succeeded: bool | None = None
    key: str | None = None
    suggests: Suggestion | None = None
    refund: Refund | None = None
    periods: dict[Window, int] = field(default_factory=dict)
    holds: dict[Window, int] = field(default_factory=dict)

    def moved(self, offset: int) -> Reservation:
        """The same with all times of the ledger earlier by so many milliseconds; 0 stands for never, and stays so."""
        moves = {each: getattr(self, each) for each in ("sent", "lease", "settled")}
        earlier = {each: at and max(at - offset, 1) for each, at in moves.items()}
        return msgspec.structs.replace(self, **earlier)


class Violation(Struct, frozen=True):
    """A policy that refused: its name, its limit, and when it resets (None if it never does by itself)."""

    policy: str
    limit: int
    resets_at: int | None


class Candidate(Struct):
    """An account that a submission may use; `probes` if that is to find out whether it can pay."""

    id: int
    policy: AccountPolicy
    state: AccountState
    probes: bool = False


class Granted(Struct, frozen=True):
    """A place is held on `account` until `lease`; both times are the server's, as in all verdicts."""

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


class Replayed(Struct, frozen=True):
    """It was submitted before under the same idempotency key: `reservation` became a task, or is unknown."""

    reservation: str
    state: ReservationState
    now: int


class InFlight(Struct, frozen=True):
    """It was submitted before under the same idempotency key, and nobody knows yet what became of it."""

    now: int


class KeyReused(Struct, frozen=True):
    """Something else was submitted before under the same idempotency key."""

    now: int


Verdict = Granted | PolicyDenied | NoAccount | Replayed | InFlight | KeyReused


class Refunding(StrEnum):
    """What became of a wish to refund a submission."""

    REFUNDED = "refunded"
    AGAIN = "again"
    """It was refunded before."""
    RUNNING = "running"
    """It has not ended, so that nobody knows yet what it costs."""
    FREE = "free"
    """It cost nothing."""
