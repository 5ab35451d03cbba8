"""What the ledger knows of one upstream account.

All times are milliseconds of the ledger's clock, money is in fen. What follows from it is decided in
`service.domain.balance`.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec
from msgspec import Struct, field

from service.domain.task import Kind


class Status(StrEnum):
    """Whether an account may be used."""

    OPEN = "open"
    EXHAUSTED = "exhausted"
    INVALID = "invalid"


class Source(StrEnum):
    """The call whose answer told a figure."""

    SUBMIT = "submit"
    CHECK = "check"


class Suggestion(StrEnum):
    """What the balance suggests of a submission whose outcome is unknown."""

    CHARGED = "charged"
    NOT_CHARGED = "not-charged"


class Figures(Struct, frozen=True):
    """What one answer told of the balance; a missing or mistyped figure is None. Money is in fen."""

    count: int | None = None
    money: int | None = None


class Figure(Struct):
    """An observed figure: when its request was sent, when its answer was received, and which call it was."""

    value: int
    sent: int
    received: int
    source: Source


class Before(Struct):
    """The figures known when a submission was reserved."""

    count: int
    money: int


class Expected(Struct):
    """The drop that the gateway's own submissions may yet cause, as far as it was not seen.

    Each of the `tasks` takes a use or money: at most `money` fen together, but for `unpriced` ones of no known limit.
    `taken` is the money that was put down to them so far.
    """

    tasks: int = 0
    money: int = 0
    unpriced: int = 0
    taken: int = 0


class Doubt(Struct):
    """A submission of unknown outcome that had the account to itself, with the figures known before it.

    `seq` is its number on the account, `since` when it became unknown. `suggests` is what was found out.
    """

    reservation: str
    seq: int
    since: int
    count: int
    money: int
    suggests: Suggestion | None = None


class Newest(Struct):
    """The finished task that was checked last: when that check was sent, and what it told."""

    reservation: str
    sent: int
    count: int
    money: int


class AccountState(Struct):
    """The ledger's knowledge of one account.

    `open` counts submissions that were reserved and have not ended, `sending` those not yet settled. `seq` numbers the
    reservations, so that a receipt can tell whether anything else happened on the account in the meantime. `closed` is
    when the request was sent whose refusal closed the account, `reopened` when an operator had it looked at again: what
    was sent before says nothing any more. `charged_late` says that a submit was seen to leave the balance as it was,
    so that accepted tasks are not in the figures before they end; None until it was seen either way. `rose` is when a
    figure was first known, or last seen to rise.

    `uncharged` counts the open submissions that may not be in the known figures yet, `thrifty` those of them that must
    not take money; `astray` counts those that ended without telling figures, or whose outcome is unknown: what is asked
    for from `astray_until` on shows them, as was last seen at `caught_up`. `expected` tells a drop that is the
    gateway's own from one that is not; the latter adds up in `unexplained_count` and `unexplained_money`. `unknown`
    counts the submissions of unknown outcome. `looks` says that re-checking a finished task, which costs nothing, was
    seen to tell the balance of now; `looked` is when the account was last closed or looked at, `in_vain` how
    many looks told nothing since one did. `prices` are the last that were paid in money, by kind, `highest` the
    highest.
    """

    status: Status = Status.OPEN
    probe_at: int = 0
    closed: int = 0
    reopened: int = 0
    charged_late: bool | None = None
    count: Figure | None = None
    money: Figure | None = None
    rose: int = 0
    open: int = 0
    sending: int = 0
    seq: int = 0
    uncharged: int = 0
    thrifty: int = 0
    astray: int = 0
    astray_until: int = 0
    caught_up: int = 0
    expected: Expected = field(default_factory=Expected)
    unexplained_count: int = 0
    unexplained_money: int = 0
    unknown: int = 0
    doubt: Doubt | None = None
    looks: bool = False
    looked: int = 0
    in_vain: int = 0
    newest: Newest | None = None
    prices: dict[Kind, int] = field(default_factory=dict)
    highest: dict[Kind, int] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """How many submissions the figures may lack."""
        return self.uncharged + self.astray

    def moved(self, offset: int) -> AccountState:
        """The same with all times earlier by so many milliseconds; 0 stands for never, and stays so."""

        def figure(known: Figure | None) -> Figure | None:
            moves = {"sent", "received"}
            return known and msgspec.structs.replace(known, **{each: earlier(getattr(known, each)) for each in moves})

        def earlier(at: int) -> int:
            return at and max(at - offset, 1)

        moves = ("probe_at", "closed", "reopened", "rose", "astray_until", "caught_up", "looked")
        return msgspec.structs.replace(
            self,
            **{each: earlier(getattr(self, each)) for each in moves},
            count=figure(self.count),
            money=figure(self.money),
            doubt=self.doubt and msgspec.structs.replace(self.doubt, since=earlier(self.doubt.since)),
            newest=self.newest and msgspec.structs.replace(self.newest, sent=earlier(self.newest.sent)),
        )
