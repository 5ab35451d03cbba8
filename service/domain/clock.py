"""The ledger's time, which never goes back and never stands still, whatever the server's clock does.

While the server's clock goes on, both are the same. When it steps back, the ledger's time goes on from where it was,
ahead of it by an offset that shrinks again: until it is gone, the ledger's time runs at nine tenths of the server's.
Leases, due times and the order of balance readings are kept in the ledger's time; windows and all times that are shown
are the server's. The Lua scripts carry the same rules out on Redis. Times are milliseconds since the epoch.
"""

from __future__ import annotations

from msgspec import Struct

OFFSET_UNITS = 10
"""The offset is counted in so many parts of a millisecond: it loses one part in each millisecond."""


class Moment(Struct, frozen=True):
    """The same moment in the ledger's time (`now`) and in the server's (`wall`)."""

    now: int
    wall: int

    @property
    def offset(self) -> int:
        """By how many milliseconds the ledger's time is ahead."""
        return self.now - self.wall


def shown(moment: Moment, at: int) -> int:
    """A time of the ledger in the server's time; 0 stands for never, and stays so."""
    return at and at - moment.offset


class LedgerClock(Struct, frozen=True):
    """The ledger's time when it was last read, and its offset then, in parts of a millisecond."""

    last: int = 0
    offset: int = 0

    def advance(self, wall: int) -> LedgerClock:
        """The clock when the server's time is `wall`."""
        elapsed = wall - (self.last - _whole(self.offset))
        offset = max(self.offset - elapsed, 0) if elapsed >= 0 else (self.last - wall) * OFFSET_UNITS
        return LedgerClock(wall + _whole(offset), offset)


def _whole(offset: int) -> int:
    """An offset in milliseconds, rounded up, so that the ledger's time does not go back where the offset shrinks."""
    return -(-offset // OFFSET_UNITS)
