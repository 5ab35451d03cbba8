"""The time of the fakes, which moves only where a test moves it."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

START = 1_790_000_000_000
"""A moment to begin at, in milliseconds: 2026-09-21 14:13:20 UTC."""


@dataclass
class FakeClock:
    """A clock that stands until it is moved; milliseconds."""

    at: int = START

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
