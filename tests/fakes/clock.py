"""Manual clock of the fakes."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from service.domain.ledger import ClockReading, LedgerClock

START = 1_790_000_000_000
"""2026-09-21 14:13:20 UTC, in milliseconds."""


@dataclass
class FakeClock:
    """A manual server clock in milliseconds, and the ledger's clock that follows it."""

    now_ms: int = START
    ledger_clock: LedgerClock = field(default_factory=LedgerClock)

    def read_times(self) -> ClockReading:
        self.ledger_clock = self.ledger_clock.advance(self.now_ms)
        return ClockReading(self.ledger_clock.last_ms, self.now_ms)

    def now(self) -> float:
        """Return seconds since the epoch."""
        return self.now_ms / 1000


class Stopwatch(msgspec.Struct, frozen=True):
    """A duration that counts only between consecutive counting moments."""

    total_ms: int = 0
    running_since: int | None = None

    def advance(self, now: int, *, counts: bool) -> Stopwatch:
        if not counts:
            return Stopwatch(self.total_ms)
        return Stopwatch(self.total_ms + (0 if self.running_since is None else now - self.running_since), now)

    def shift(self, offset: int) -> Stopwatch:
        """Return the same stopwatch on a clock that is `offset` behind."""
        return Stopwatch(self.total_ms, None if self.running_since is None else self.running_since - offset)
