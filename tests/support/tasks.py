"""Tasks for tests without a ledger, and the durations of a gateway with default settings."""

from __future__ import annotations

from typing import Any

from msgspec import Raw
from msgspec.structs import replace

from service.domain.tasks import Cost, CostBasis, Kind, State, Task
from service.storage.ledger import Retention
from service.storage.redis import DAY_MS

CREATED_AT = 1_790_000_000_000

_TASK = Task(
    id="task_1",
    reservation="r1",
    tenant=1,
    account=2,
    kind=Kind.UPSCALE,
    state=State.QUEUED,
    created_at=CREATED_AT,
    updated_at=CREATED_AT,
    finished_at=None,
    options=Raw(b"{}"),
    metadata=Raw(b"{}"),
    artifacts=(),
    error=None,
    cost=Cost(0, 0, CostBasis.UNKNOWN),
    version=1,
    last_checked_at=CREATED_AT,
)


_RETENTION = Retention(
    lease_ms=180_000,
    check_interval_ms=2_500,
    claim_lease_ms=30_000,
    watched_ms=30_000,
    lost_after_ms=1_800_000,
    unusable_after_ms=DAY_MS,
    keep_finished_ms=30 * DAY_MS,
)


def make_task(**changes: Any) -> Task:
    """Make a just accepted task, in version 1, with some changes."""
    return replace(_TASK, **changes)


def make_succeeded_task(seconds: float, **changes: Any) -> Task:
    """Make a task that succeeded after so many seconds."""
    end = CREATED_AT + int(seconds * 1000)
    return make_task(state=State.SUCCEEDED, updated_at=end, finished_at=end, version=3, **changes)


def make_retention(**changes: int) -> Retention:
    """Return the default durations with some of them changed (ms)."""
    return replace(_RETENTION, **changes)
