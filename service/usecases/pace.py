"""How long tasks take, learned from those that succeed, so that callers are told when it is worth to ask again."""

from __future__ import annotations

import math

from service.domain.tasks import Kind, State, Task

_WEIGHT = 0.2
"""How much the newest end counts against all before it."""
_LONGEST = 30


class Pace:
    """Learns from every end that this process hears of."""

    def __init__(self, poll_seconds: float) -> None:
        self._poll_seconds = poll_seconds
        self._seconds: dict[Kind, float] = {}

    def ended(self, task: Task) -> None:
        """A task has ended. One that failed tells nothing of how long the others take."""
        if task.state is not State.SUCCEEDED:
            return
        took = (task.updated - task.created) / 1000
        known = self._seconds.get(task.kind, took)
        self._seconds[task.kind] = known + _WEIGHT * (took - known)

    def retry_after(self, task: Task, now: int) -> int:
        """After how many whole seconds to ask again about a task that runs, at the ledger's time `now`."""
        left = self._seconds.get(task.kind, 0.0) - (now - task.created) / 1000
        return math.ceil(min(max(left, self._poll_seconds), _LONGEST))
