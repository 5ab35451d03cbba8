"""A cache of tasks per process, and the subscriptions to their changes."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from msgspec import Struct

from service.domain.errors import Overloaded
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


REMEMBERED = 10_000
"""How many tasks are held at the most, beside those that are waited for: the ones asked for last."""


RUNNING_SECONDS = 1.0
"""For how long a task that runs is shown from memory. One that has ended does not change any more."""


VERIFIED_SECONDS = 1.0
"""For how long a task that has ended is shown from memory before the store is asked whether it still knows it."""


_OVERTAKEN_MS = 60_000
"""Reads overtake each other by less: what was checked longer ago was so by a clock that has stepped back since."""


MOST_WATCHERS = 10_000
"""How many may wait in one process, each of whom holds a connection and some memory."""


_FULL_SECONDS = 5.0


class Seen(Struct, frozen=True):
    """A task, the server's time (ms) when it was known to be so, and when that was by the monotonic clock.

    It is not `recorded` if the upstream told an end that the store has not confirmed.
    """

    task: Task
    now: int
    at: float
    recorded: bool = True

    @property
    def age(self) -> float:
        """How many seconds ago the upstream last told of the task."""
        return (self.now - self.task.checked) / 1000 + time.monotonic() - self.at


class Watcher:
    """Waits for the changes of one task."""

    def __init__(self, board: Board, reservation: str) -> None:
        self._board = board
        self._reservation = reservation
        self._woken: asyncio.Future[None] | None = None

    async def changed(self, version: int, seconds: float) -> Seen | None:
        """The task once it has ended or is later than `version`; None if not within `seconds`, or at the close."""
        deadline = time.monotonic() + seconds
        while True:
            seen = self._board.newest(self._reservation)
            if seen and (seen.task.version > version or seen.task.state.ended):
                return seen
            left = deadline - time.monotonic()
            if self._board.closed or left <= 0:
                return None
            self._woken = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(left):
                    await self._woken
            except TimeoutError:
                return None
            finally:
                self._woken = None

    def wake(self) -> None:
        """Look again."""
        if self._woken and not self._woken.done():
            self._woken.set_result(None)


class Board:
    """Tasks by the ids of their reservations, watched by at most so many at once.

    `pace` learns from every end that is announced, `closed` says that the process ends, `waiting` how many wait now.
    """

    def __init__(self, pace: Pace, *, most_watchers: int = MOST_WATCHERS) -> None:
        self.pace = pace
        self.closed = False
        self.waiting = 0
        self._most_watchers = most_watchers
        self._seen: OrderedDict[str, Seen] = OrderedDict()
        self._watchers: dict[str, set[Watcher]] = {}

    def post(self, task: Task, now: int, *, recorded: bool = True) -> Seen:
        """Take in what was known of a task at the server's time `now`, and give what is: it may be known better.

        An end is never taken back, not even where the store has lost it and counts the versions anew.
        """
        known = self._seen.get(task.reservation)
        if known and (_rank(known.task), _overtaken(known.task, task)) > (_rank(task), False):
            return known
        seen = self._seen[task.reservation] = Seen(task, now, time.monotonic(), recorded)
        self._seen.move_to_end(task.reservation)
        while len(self._seen) > REMEMBERED + len(self._watchers):
            self._forget_oldest()
        if known is None or _rank(known.task) < _rank(task):
            for watcher in self._watchers.get(task.reservation, ()):
                watcher.wake()
        return seen

    def announced(self, task: Task, now: int) -> None:
        """Take in a change that every process is told, and learn from it."""
        if task.state.ended:
            self.pace.ended(task)
        self.recorded(task, now)

    def recorded(self, task: Task, now: int) -> None:
        """Take in a change before it is announced; one of a task that nobody has asked for here is not kept."""
        if task.reservation in self._seen or task.reservation in self._watchers:
            self.post(task, now)

    def newest(self, reservation: str) -> Seen | None:
        """What was last known of a task, however long ago."""
        return self._seen.get(reservation)

    def fresh(self, reservation: str) -> Seen | None:
        """What is known of a task, if that is good enough to be shown."""
        seen = self._seen.get(reservation)
        if seen is None or not seen.recorded:
            return None
        if not seen.task.state.ended and time.monotonic() - seen.at > RUNNING_SECONDS:
            return None
        self._seen.move_to_end(reservation)
        return seen

    def to_verify(self, reservation: str) -> bool:
        """Whether to ask the store about a task that has ended: once per interval, for the first that asks this."""
        seen = self._seen.get(reservation)
        if seen is None or not seen.task.state.ended or time.monotonic() - seen.at <= VERIFIED_SECONDS:
            return False
        age = seen.age * 1000
        self._seen[reservation] = Seen(seen.task, seen.task.checked + int(age), time.monotonic())
        return True

    @contextmanager
    def watching(self, reservation: str) -> Iterator[Watcher]:
        """A watcher of a task: what it waits for is told to it until the end of the block.

        Raises Overloaded if too many wait already.
        """
        if self.waiting >= self._most_watchers:
            raise Overloaded("Too many wait for tasks already. Try again later.", retry_after=_FULL_SECONDS)
        watcher = Watcher(self, reservation)
        self._watchers.setdefault(reservation, set()).add(watcher)
        self.waiting += 1
        try:
            yield watcher
        finally:
            self.waiting -= 1
            self._watchers[reservation].discard(watcher)
            if not self._watchers[reservation]:
                del self._watchers[reservation]

    def waits(self, reservation: str) -> int:
        """How many wait for a task."""
        return len(self._watchers.get(reservation, ()))

    def watched(self) -> Sequence[str]:
        """The tasks that somebody waits for."""
        return list(self._watchers)

    def close(self) -> None:
        """Let nobody wait any longer: the process ends."""
        self.closed = True
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.wake()

    def _forget_oldest(self) -> None:
        for reservation in self._seen:
            if reservation not in self._watchers:
                del self._seen[reservation]
                return


def _rank(task: Task) -> tuple[bool, int]:
    """Which of two states of a task is the later one."""
    return task.state.ended, task.version


def _overtaken(known: Task, task: Task) -> bool:
    """Whether a read tells what was known before another one did."""
    return 0 < known.checked - task.checked < _OVERTAKEN_MS
