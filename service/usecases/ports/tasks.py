"""The tasks that were accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from service.domain.tasks import Backlog, Kind, State, Task
from service.usecases.ports.upstream import Check


class Due(Struct, frozen=True):
    """A task claimed for a check that was `due` then; `claimed` is the time of the claim, and so of the check.

    Both are the ledger's time.
    """

    task: Task
    claimed: int
    due: int


class Page(Struct, frozen=True):
    """Tasks, newest first, and where to go on (None at the end)."""

    tasks: tuple[Task, ...]
    cursor: str | None


class Tasks(Protocol):
    """The tasks the ledger accepted, and which of them are to be checked when."""

    async def get(self, reservation: str) -> tuple[Task, int] | None:
        """A task and the server's time now; None if it is not known (any more)."""
        ...

    async def attend(self, reservations: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        """As `get`, for somebody who looks at tasks or waits for them: they are checked often for a while."""
        ...

    async def page(
        self, tenant: int, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> Page:
        """A tenant's tasks, newest first. Raises MalformedRequest for a cursor that is none."""
        ...

    async def claim(self, most: int) -> Sequence[Due]:
        """Up to `most` tasks whose check is due, which nobody else gets until their lease runs out."""
        ...

    async def backlog(self) -> Backlog:
        """How many tasks are watched, and how late the first check is that nobody has claimed."""
        ...

    async def record(self, due: Due, check: Check) -> tuple[Task, int] | None:
        """Write what a check said, and when to check again; the task and the time now, None if it had ended or is gone.

        An end is recorded once, with its receipt, and never undone. What can be seen of a task is announced.
        """
        ...
