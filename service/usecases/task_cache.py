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

_NEWEST_WEIGHT = 0.2
"""How much the newest end counts against all before it."""


_MAX_RETRY_AFTER_SECONDS = 30


class DurationEstimator:
    """Learns from every end that this process hears of."""

    def __init__(self, poll_seconds: float) -> None:
        self._poll_seconds = poll_seconds
        self._seconds: dict[Kind, float] = {}

    def record_end(self, task: Task) -> None:
        """A task has ended. One that failed tells nothing of how long the others take."""
        if task.state is not State.SUCCEEDED:
            return
        took = (task.updated_at - task.created_at) / 1000
        known = self._seconds.get(task.kind, took)
        self._seconds[task.kind] = known + _NEWEST_WEIGHT * (took - known)

    def retry_after(self, task: Task, now: int) -> int:
        """After how many whole seconds to ask again about a task that runs, at the ledger's time `now`."""
        left = self._seconds.get(task.kind, 0.0) - (now - task.created_at) / 1000
        return math.ceil(min(max(left, self._poll_seconds), _MAX_RETRY_AFTER_SECONDS))


MAX_CACHED_TASKS = 10_000
"""How many tasks are held at the most, beside those that are waited for: the ones asked for last."""


RUNNING_TTL_SECONDS = 1.0
"""For how long a task that runs is shown from memory. One that has ended does not change any more."""


FINISHED_TTL_SECONDS = 1.0
"""For how long a task that has ended is shown from memory before the store is asked whether it still knows it."""


_MAX_REORDER_MS = 60_000
"""Reads overtake each other by less: what was checked longer ago was so by a clock that has stepped back since."""


MAX_SUBSCRIPTIONS = 10_000
"""How many may wait in one process, each of whom holds a connection and some memory."""


_FULL_RETRY_SECONDS = 5.0


class CachedTask(Struct, frozen=True):
    """A task, the server's time (ms) when it was known to be so, and when that was by the monotonic clock.

    It is not `recorded` if the upstream told an end that the store has not confirmed.
    """

    task: Task
    known_at: int
    monotonic_at: float
    is_recorded: bool = True

    @property
    def age_seconds(self) -> float:
        """How many seconds ago the upstream last told of the task."""
        return (self.known_at - self.task.last_checked_at) / 1000 + time.monotonic() - self.monotonic_at


class Subscription:
    """Waits for the changes of one task."""

    def __init__(self, cache: TaskCache, reservation: str) -> None:
        self._cache = cache
        self._reservation = reservation
        self._wakeup: asyncio.Future[None] | None = None

    async def wait_for_change(self, version: int, seconds: float) -> CachedTask | None:
        """The task once it has ended or is later than `version`; None if not within `seconds`, or at the close."""
        deadline = time.monotonic() + seconds
        while True:
            seen = self._cache.latest(self._reservation)
            if seen and (seen.task.version > version or seen.task.state.is_final):
                return seen
            left = deadline - time.monotonic()
            if self._cache.is_closed or left <= 0:
                return None
            self._wakeup = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(left):
                    await self._wakeup
            except TimeoutError:
                return None
            finally:
                self._wakeup = None

    def notify(self) -> None:
        """Look again."""
        if self._wakeup and not self._wakeup.done():
            self._wakeup.set_result(None)


class TaskCache:
    """Tasks by the ids of their reservations, watched by at most so many at once.

    `pace` learns from every end that is announced, `closed` says that the process ends, `waiting` how many wait now.
    """

    def __init__(self, durations: DurationEstimator, *, max_subscriptions: int = MAX_SUBSCRIPTIONS) -> None:
        self.durations = durations
        self.is_closed = False
        self.subscription_count = 0
        self._max_subscriptions = max_subscriptions
        self._tasks: OrderedDict[str, CachedTask] = OrderedDict()
        self._subscriptions: dict[str, set[Subscription]] = {}

    def put(self, task: Task, known_at: int, *, is_recorded: bool = True) -> CachedTask:
        """Take in what was known of a task at the server's time `now`, and give what is: it may be known better.

        An end is never taken back, not even where the store has lost it and counts the versions anew.
        """
        known = self._tasks.get(task.reservation)
        if known and (_version_rank(known.task), _is_stale_read(known.task, task)) > (_version_rank(task), False):
            return known
        seen = self._tasks[task.reservation] = CachedTask(task, known_at, time.monotonic(), is_recorded)
        self._tasks.move_to_end(task.reservation)
        while len(self._tasks) > MAX_CACHED_TASKS + len(self._subscriptions):
            self._evict_oldest()
        if known is None or _version_rank(known.task) < _version_rank(task):
            for watcher in self._subscriptions.get(task.reservation, ()):
                watcher.notify()
        return seen

    def on_published(self, task: Task, now: int) -> None:
        """Take in a change that every process is told, and learn from it."""
        if task.state.is_final:
            self.durations.record_end(task)
        self.on_recorded(task, now)

    def on_recorded(self, task: Task, now: int) -> None:
        """Take in a change before it is announced; one of a task that nobody has asked for here is not kept."""
        if task.reservation in self._tasks or task.reservation in self._subscriptions:
            self.put(task, now)

    def latest(self, reservation: str) -> CachedTask | None:
        """What was last known of a task, however long ago."""
        return self._tasks.get(reservation)

    def get_fresh(self, reservation: str) -> CachedTask | None:
        """What is known of a task, if that is good enough to be shown."""
        seen = self._tasks.get(reservation)
        if seen is None or not seen.is_recorded:
            return None
        if not seen.task.state.is_final and time.monotonic() - seen.monotonic_at > RUNNING_TTL_SECONDS:
            return None
        self._tasks.move_to_end(reservation)
        return seen

    def claim_verification(self, reservation: str) -> bool:
        """Whether to ask the store about a task that has ended: once per interval, for the first that asks this."""
        seen = self._tasks.get(reservation)
        if seen is None or not seen.task.state.is_final or time.monotonic() - seen.monotonic_at <= FINISHED_TTL_SECONDS:
            return False
        age = seen.age_seconds * 1000
        self._tasks[reservation] = CachedTask(seen.task, seen.task.last_checked_at + int(age), time.monotonic())
        return True

    @contextmanager
    def subscribe(self, reservation: str) -> Iterator[Subscription]:
        """A watcher of a task: what it waits for is told to it until the end of the block.

        Raises Overloaded if too many wait already.
        """
        if self.subscription_count >= self._max_subscriptions:
            raise Overloaded("Too many wait for tasks already. Try again later.", retry_after=_FULL_RETRY_SECONDS)
        watcher = Subscription(self, reservation)
        self._subscriptions.setdefault(reservation, set()).add(watcher)
        self.subscription_count += 1
        try:
            yield watcher
        finally:
            self.subscription_count -= 1
            self._subscriptions[reservation].discard(watcher)
            if not self._subscriptions[reservation]:
                del self._subscriptions[reservation]

    def count_subscriptions(self, reservation: str) -> int:
        """How many wait for a task."""
        return len(self._subscriptions.get(reservation, ()))

    def subscribed_ids(self) -> Sequence[str]:
        """The tasks that somebody waits for."""
        return list(self._subscriptions)

    def close(self) -> None:
        """Let nobody wait any longer: the process ends."""
        self.is_closed = True
        for watchers in self._subscriptions.values():
            for watcher in watchers:
                watcher.notify()

    def _evict_oldest(self) -> None:
        for reservation in self._tasks:
            if reservation not in self._subscriptions:
                del self._tasks[reservation]
                return


def _version_rank(task: Task) -> tuple[bool, int]:
    """Which of two states of a task is the later one."""
    return task.state.is_final, task.version


def _is_stale_read(known: Task, task: Task) -> bool:
    """Whether a read tells what was known before another one did."""
    return 0 < known.last_checked_at - task.last_checked_at < _MAX_REORDER_MS
