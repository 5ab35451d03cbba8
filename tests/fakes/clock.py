"""The time of the fakes, which moves only where a test moves it."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from service.domain.ledger import ClockReading, LedgerClock

START = 1_790_000_000_000
"""A moment to begin at, in milliseconds: 2026-09-21 14:13:20 UTC."""


@dataclass
class FakeClock:
    """The server's clock, which stands until it is moved, and the ledger's time that follows from it; milliseconds."""

    now_ms: int = START
    ledger_clock: LedgerClock = field(default_factory=LedgerClock)

    def read_times(self) -> ClockReading:
        """The time of both."""
        self.ledger_clock = self.ledger_clock.advance(self.now_ms)
        return ClockReading(self.ledger_clock.last_ms, self.now_ms)

    def now(self) -> float:
        """Seconds since the epoch."""
        return self.now_ms / 1000


class Stopwatch(msgspec.Struct, frozen=True):
    """How long something has lasted, in which only time between two moments that count in a row is counted."""

    total_ms: int = 0
    running_since: int | None = None

    def advance(self, now: int, *, counts: bool) -> Stopwatch:
        """What it shows now."""
        if not counts:
            return Stopwatch(self.total_ms)
        return Stopwatch(self.total_ms + (0 if self.running_since is None else now - self.running_since), now)

    def shift(self, offset: int) -> Stopwatch:
        """The same on a clock that is behind by so much."""
        return Stopwatch(self.total_ms, None if self.running_since is None else self.running_since - offset)
