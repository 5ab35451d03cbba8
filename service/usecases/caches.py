"""What a process holds in memory: the registry, and tasks with the subscriptions to their changes."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import structlog
from msgspec import Struct
from msgspec.structs import replace

from service.domain.errors import LedgerUnavailable, Overloaded
from service.domain.tasks import Kind, State, Task
from service.domain.tenants import Registry
from service.usecases.ports import RegistryChange, RegistryStore

_log = structlog.get_logger(__name__)

_NEWEST_WEIGHT = 0.2
"""Weight of the latest duration in the moving average."""
_MAX_RETRY_AFTER_SECONDS = 30


class DurationEstimator:
    """Learns how long tasks of each kind take, for `Retry-After`."""

    def __init__(self, poll_seconds: float) -> None:
        self._poll_seconds = poll_seconds
        self._seconds: dict[Kind, float] = {}

    def record_end(self, task: Task) -> None:
        if task.state is not State.SUCCEEDED:
            return
        seconds = (task.updated_at - task.created_at) / 1000
        average = self._seconds.get(task.kind, seconds)
        self._seconds[task.kind] = average + _NEWEST_WEIGHT * (seconds - average)

    def retry_after(self, task: Task, now: int) -> int:
        """Return whole seconds after which to ask for a running task again; `now` in milliseconds."""
        remaining = self._seconds.get(task.kind, 0.0) - (now - task.created_at) / 1000
        return math.ceil(min(max(remaining, self._poll_seconds), _MAX_RETRY_AFTER_SECONDS))


MAX_CACHED_TASKS = 10_000
"""Cached tasks beside those with subscriptions; the least recently read are evicted."""
RUNNING_TTL_SECONDS = 1.0
"""Time for which a running task is served from the cache."""
FINISHED_TTL_SECONDS = 1.0
"""Time for which a finished task is served before the store must confirm it."""
_MAX_REORDER_MS = 60_000
"""Concurrent reads are reordered by less; a greater difference means that the server clock stepped back."""


class CachedTask(Struct):
    """A task with the server time (ms) and the monotonic time at which it was current.

    Not `is_recorded`: the upstream reported an end that the store has not confirmed. `content` is for the API, which
    keeps there what it sends for the task.
    """

    task: Task
    known_at: int
    monotonic_at: float
    is_recorded: bool = True
    content: Any = None

    @property
    def age_seconds(self) -> float:
        """Seconds since the upstream last reported on the task."""
        return (self.known_at - self.task.last_checked_at) / 1000 + time.monotonic() - self.monotonic_at


class Subscription:
    def __init__(self, cache: TaskCache, reservation: str) -> None:
        self._cache = cache
        self._reservation = reservation
        self._wakeup: asyncio.Future[None] | None = None

    async def wait_for_change(self, version: int, seconds: float) -> CachedTask | None:
        """Return the task once it has ended or is later than `version`; None on timeout or when the process ends."""
        deadline = time.monotonic() + seconds
        while True:
            cached = self._cache.latest(self._reservation)
            if cached and (cached.task.version > version or cached.task.state.is_final):
                return cached
            remaining = deadline - time.monotonic()
            if self._cache.is_closed or remaining <= 0:
                return None
            self._wakeup = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(remaining):
                    await self._wakeup
            except TimeoutError:
                return None
            finally:
                self._wakeup = None

    def notify(self) -> None:
        if self._wakeup and not self._wakeup.done():
            self._wakeup.set_result(None)


class TaskCache:
    """Tasks by the ids of their reservations, and the subscriptions to them.

    Every process receives every change, so repeated reads cost nothing. Only the latest version is held: a slow reader
    finds that, and no queue grows.
    """

    def __init__(self, durations: DurationEstimator) -> None:
        self.durations = durations
        self.is_closed = False
        self.subscription_count = 0
        self._tasks: OrderedDict[str, CachedTask] = OrderedDict()
        self._subscriptions: dict[str, set[Subscription]] = {}

    def put(self, task: Task, known_at: int, *, is_recorded: bool = True) -> CachedTask:
        """Store a version of a task and return the latest one, which may be a different one.

        An end is never undone, not even if the store lost it and counts versions anew.
        """
        cached = self._tasks.get(task.reservation)
        if cached and (_version_rank(cached.task), _is_stale_read(cached.task, task)) > (_version_rank(task), False):
            return cached
        content = cached.content if cached and cached.content and _is_same(cached.task, task) else None
        updated = self._tasks[task.reservation] = CachedTask(task, known_at, time.monotonic(), is_recorded, content)
        self._tasks.move_to_end(task.reservation)
        while len(self._tasks) > MAX_CACHED_TASKS + len(self._subscriptions):
            oldest = next(known for known in self._tasks if known not in self._subscriptions)
            del self._tasks[oldest]
        if cached is None or _version_rank(cached.task) < _version_rank(task):
            for subscription in self._subscriptions.get(task.reservation, ()):
                subscription.notify()
        return updated

    def on_published(self, task: Task, now: int) -> None:
        """Apply a change that was published to every process."""
        if task.state.is_final:
            self.durations.record_end(task)
        self.on_recorded(task, now)

    def on_recorded(self, task: Task, now: int) -> None:
        """Apply a change ahead of its publication; a task without interest here is not cached."""
        if task.reservation in self._tasks or task.reservation in self._subscriptions:
            self.put(task, now)

    def latest(self, reservation: str) -> CachedTask | None:
        return self._tasks.get(reservation)

    def get_fresh(self, reservation: str) -> CachedTask | None:
        """Return a task if it is recent enough to be served."""
        cached = self._tasks.get(reservation)
        if cached is None or not cached.is_recorded:
            return None
        if not cached.task.state.is_final and time.monotonic() - cached.monotonic_at > RUNNING_TTL_SECONDS:
            return None
        self._tasks.move_to_end(reservation)
        return cached

    def claim_verification(self, reservation: str) -> bool:
        """Return True once per interval for a finished task: the caller then checks that the store has it."""
        cached = self._tasks.get(reservation)
        if (
            cached is None
            or not cached.task.state.is_final
            or time.monotonic() - cached.monotonic_at <= FINISHED_TTL_SECONDS
        ):
            return False
        cached.known_at = cached.task.last_checked_at + int(cached.age_seconds * 1000)
        cached.monotonic_at = time.monotonic()
        return True

    @contextmanager
    def subscribe(self, reservation: str) -> Iterator[Subscription]:
        """Subscribe to a task within the block."""
        subscription = Subscription(self, reservation)
        self._subscriptions.setdefault(reservation, set()).add(subscription)
        self.subscription_count += 1
        try:
            yield subscription
        finally:
            self.subscription_count -= 1
            self._subscriptions[reservation].discard(subscription)
            if not self._subscriptions[reservation]:
                del self._subscriptions[reservation]

    def count_subscriptions(self, reservation: str) -> int:
        return len(self._subscriptions.get(reservation, ()))

    def subscribed_ids(self) -> Sequence[str]:
        return list(self._subscriptions)

    def clear(self) -> None:
        """Forget all tasks, as a process that just started."""
        self._tasks.clear()

    def close(self) -> None:
        """End all subscriptions: the process ends."""
        self.is_closed = True
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.notify()


def _version_rank(task: Task) -> tuple[bool, int]:
    return task.state.is_final, task.version


def _is_same(cached: Task, task: Task) -> bool:
    """Whether two versions look the same to callers."""
    return cached == replace(task, last_checked_at=cached.last_checked_at)


def _is_stale_read(cached: Task, task: Task) -> bool:
    return 0 < cached.last_checked_at - task.last_checked_at < _MAX_REORDER_MS


_MAX_WRITES = 10
R = TypeVar("R")


def no_change(registry: Registry) -> RegistryChange:
    """Return an empty change of a version, to be filled with `replace`."""
    return RegistryChange(version=registry.version, next_id=registry.next_id)


class CachedRegistry:
    """The registry in the memory of this process, kept up to date by `refresh`.

    Reading `current` never waits. It is empty and not ready until `refresh` has succeeded once. While Redis is away it
    stays as it was, and it is written back to a Redis that has lost it. `on_change` is called after each change of it.
    """

    def __init__(self, store: RegistryStore) -> None:
        self.store = store
        self.is_ready = False
        self.current = Registry()
        self.on_change: list[Callable[[], None]] = []
        self._lock = asyncio.Lock()

    async def refresh(self) -> None:
        """Load the newest version. Raises LedgerUnavailable."""
        if self.is_ready:
            held, version = self.current, await self.store.read_version()
            if version == held.version:
                return
            if version < held.version:
                await self._restore(held)
        loaded = await self.store.load()
        if self.is_ready and loaded.version <= self.current.version:  # a concurrent call has loaded a later one
            return
        self.current, self.is_ready = loaded, True
        for notify in self.on_change:
            notify()

    async def write_change(
        self,
        event: str,
        make_change: Callable[[Registry], tuple[RegistryChange, R]],
        describe: Callable[[R], Mapping[str, Any]] = lambda _: {},
        **log_fields: Any,
    ) -> R:
        """Write what `make_change` returns for the latest version; retry if another process was faster.

        The change is logged with `log_fields` and what `describe` returns for the result. Raises LedgerUnavailable,
        Overloaded, and what `make_change` raises.
        """
        async with self._lock:  # changes of one process need not race
            for _ in range(_MAX_WRITES):
                await self.refresh()
                change, result = make_change(self.current)
                if await self.store.write(change):
                    _log.info(event, version=change.version + 1, **log_fields, **describe(result))
                    with suppress(LedgerUnavailable):  # the change is written; this copy follows in the background
                        await self.refresh()
                    return result
        raise Overloaded("The registry is being changed by others. Try again.", retry_after=1)

    async def _restore(self, held: Registry) -> None:
        """Write back what the store has lost: tokens and limits stay in force, revoked tokens stay revoked.

        Only a loss makes versions go back. The first of several processes that notice it restores the registry.
        """
        stored = await self.store.load()
        replaced = {tenant.id: name for name, tenant in stored.tenants.items() if held.tenant_by_id(tenant.id) is None}
        change = RegistryChange(
            version=stored.version,
            next_id=held.next_id,
            newer_than=held.version,
            tenants=tuple(held.tenants.values()),
            accounts=tuple(held.accounts.values()),
            tokens=tuple(held.tokens.values()),
            drop_tenants=tuple(tenant for name, tenant in stored.tenants.items() if name not in held.tenants),
            drop_accounts=tuple(account for name, account in stored.accounts.items() if name not in held.accounts),
            drop_tokens=tuple(token for name, token in stored.tokens.items() if name not in held.tokens),
            deleted_tenant_names={**replaced, **held.deleted_tenant_names},
        )
        restored = await self.store.write(change)
        _log.error("registry.restored_from_memory", stored=stored.version, held=held.version, restored=restored)
