"""When a running task is checked again. All times are milliseconds."""

from __future__ import annotations

LONGEST = 30_000
"""Nobody who asks anew finds a task that was checked longer ago than this."""
LONGEST_BACKOFF = 60_000
_SHARE_OF_AGE = 20


def check_after(poll: int, age: int, misses: int, *, interesting: bool) -> int:
    """How long after a check the next one is due: `poll` at the least.

    A task that somebody looks at or waits for (`interesting`) is checked each time; else the less often the older it
    is, as what ran for minutes may run for more. Checks that failed in a row (`misses`) are repeated ever later.
    """
    if misses:
        return min(poll << misses, max(LONGEST_BACKOFF, poll))
    if interesting:
        return poll
    return max(min(age // _SHARE_OF_AGE, LONGEST), poll)
