"""The durations of a gateway with default settings."""

from __future__ import annotations

from service.storage.ledger import Retention
from service.storage.redis import DAY_MS


def make_retention(**changes: int) -> Retention:
    """Return the default durations with some of them changed (ms)."""
    defaults = {
        "lease_ms": 180_000,
        "check_interval_ms": 2_500,
        "claim_lease_ms": 30_000,
        "watched_ms": 30_000,
        "lost_after_ms": 1_800_000,
        "unusable_after_ms": DAY_MS,
        "keep_finished_ms": 30 * DAY_MS,
    }
    return Retention(**(defaults | changes))
