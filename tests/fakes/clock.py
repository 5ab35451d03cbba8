"""The time of the fakes, which moves only where a test moves it."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from service.domain.ledger import LedgerClock, Moment

START = 1_790_000_000_000
"""A moment to begin at, in milliseconds: 2026-09-21 14:13:20 UTC."""


@dataclass
class FakeClock:
    """The server's clock, which stands until it is moved, and the ledger's time that follows from it; milliseconds."""

    at: int = START
    kept: LedgerClock = field(default_factory=LedgerClock)

    def moment(self) -> Moment:
        """The time of both."""
        self.kept = self.kept.advance(self.at)
        return Moment(self.kept.last, self.at)

    def now(self) -> float:
        """Seconds since the epoch."""
        return self.at / 1000


class Stopwatch(msgspec.Struct, frozen=True):
    """How long something has lasted, in which only time between two moments that count in a row is counted."""

    total: int = 0
    since: int | None = None

    def went_on(self, now: int, *, counts: bool) -> Stopwatch:
        """What it shows now."""
        if not counts:
            return Stopwatch(self.total)
        return Stopwatch(self.total + (0 if self.since is None else now - self.since), now)

    def moved(self, offset: int) -> Stopwatch:
        """The same on a clock that is behind by so much."""
        return Stopwatch(self.total, None if self.since is None else self.since - offset)
