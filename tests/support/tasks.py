"""Tasks for tests that need no ledger."""

from __future__ import annotations

from typing import Any

from msgspec import Raw
from msgspec.structs import replace

from service.domain.tasks import Basis, Cost, Kind, State, Task

CREATED = 1_790_000_000_000

_TASK = Task(
    id="task_1",
    reservation="r1",
    tenant=1,
    account=2,
    kind=Kind.UPSCALE,
    state=State.QUEUED,
    created=CREATED,
    updated=CREATED,
    finished=None,
    options=Raw(b"{}"),
    metadata=Raw(b"{}"),
    artifacts=(),
    error=None,
    cost=Cost(0, 0, Basis.UNKNOWN),
    version=1,
    checked=CREATED,
)


def a_task(**changes: Any) -> Task:
    """A task that was just accepted, in version 1, but for some changes."""
    return replace(_TASK, **changes)


def succeeded(seconds: float, **changes: Any) -> Task:
    """A task that took so long."""
    end = CREATED + int(seconds * 1000)
    return a_task(state=State.SUCCEEDED, updated=end, finished=end, version=3, **changes)
