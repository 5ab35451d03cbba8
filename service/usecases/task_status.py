"""Reads, waits and streams of tasks, and their results.

Reads cost the upstream nothing: they return what the poller recorded, and waiting clients are notified of it. Only a
task that Redis lost, or can't be asked for, is queried at the upstream, which its encrypted id makes possible.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import cast

import msgspec
import structlog
from msgspec import Struct

from service.crypto import TaskIdCodec
from service.domain.errors import GatewayError, LedgerUnavailable, NotFound, Overloaded, UpstreamUnavailable
from service.domain.ledger import ReservationState
from service.domain.tasks import Artifact, State, Task, TaskReference, new_task
from service.domain.tenants import Account, Tenant
from service.telemetry.logging import upstream_wait
from service.telemetry.metrics import Metrics, ReadSource
from service.usecases.caches import CachedRegistry, CachedTask, Subscription, TaskCache
from service.usecases.poller import report_end
from service.usecases.ports import (
    ArtifactStream,
    CheckOutcome,
    CheckResult,
    ClaimedCheck,
    Ledger,
    NewTask,
    RangeRequest,
    Settlement,
    TaskStore,
    Upstream,
)
from service.usecases.settlement import READER, log_settlement

_log = structlog.get_logger(__name__)

HEARTBEAT_SECONDS = 15.0
"""A stream without a change yields None after this time."""
_MAX_QUERIES = 10_000
_BATCH_SIZE = 100
MAX_RECREATE_AGE_SECONDS = 30 * 86_400
"""A lost task is recreated up to this age: reservations are kept longer, whatever the settings."""
_EMPTY_JSON = msgspec.Raw(b"{}")
NEW_TASK_SECONDS = 300
"""Up to this age a task that neither the store nor the upstream knows is 503, not 404."""
RECENT_END_SECONDS = 300.0
"""For this long after a task's end, its results may not be in the vendor's store yet."""


MAX_WAITS = 10_000
"""Clients of a process that wait for a task or stream it; each holds a connection and some memory."""
MAX_DOWNLOADS = 100
"""Per process; each holds two or three connections."""
_FULL_RETRY_SECONDS = 5.0


class TenantSlots:
    """Slots of a process for requests that last long; one tenant may hold the part `share` of them, at least one."""

    def __init__(self, limit: int, share: float = 1) -> None:
        self._limit = limit
        self._limit_per_tenant = max(int(limit * share), 1)
        self._used = 0
        self._used_by_tenant: Counter[int] = Counter()

    @contextmanager
    def hold(self, tenant: int) -> Iterator[None]:
        """Hold a slot within the block. Raises Overloaded if there is none for this tenant."""
        if self._used >= self._limit or self._used_by_tenant[tenant] >= self._limit_per_tenant:
            detail = "Too many such requests of your service, or of all, are in progress. Try again later."
            raise Overloaded(detail, retry_after=_FULL_RETRY_SECONDS)
        self._used += 1
        self._used_by_tenant[tenant] += 1
        try:
            yield
        finally:
            self._used -= 1
            self._used_by_tenant[tenant] -= 1
            if not self._used_by_tenant[tenant]:
                del self._used_by_tenant[tenant]


FetchArtifact = Callable[[Account | None, Artifact, RangeRequest, bool], AbstractAsyncContextManager[ArtifactStream]]
"""Opens a result of an account's task within the block; the account is None if deleted.

Connects to public addresses and to the account's own upstream only. A missing result of a task that ended recently (the
last argument) raises UpstreamUnavailable. Entering may also raise UpstreamInvalidResponse, RangeNotSatisfiable or
Overloaded.
"""


class _ReadBatch(Struct):
    """Tasks by their reservations, which one call of the store reads."""

    rows: dict[str, tuple[Task, int] | None]
    reading: asyncio.Task[None] | None = None


class _Query(Struct):
    """A query at the upstream, shared by all readers within an interval."""

    started_at: float
    check: asyncio.Future[CheckResult]


@dataclass(kw_only=True, eq=False, repr=False)
class TaskReader:
    tasks: TaskStore
    ledger: Ledger
    upstream: Upstream
    fetch_artifact: FetchArtifact
    registry: CachedRegistry
    task_ids: TaskIdCodec
    cache: TaskCache
    now: Callable[[], float]
    metrics: Metrics
    interval_seconds: float
    waits: TenantSlots = field(default_factory=lambda: TenantSlots(MAX_WAITS))
    downloads: TenantSlots = field(default_factory=lambda: TenantSlots(MAX_DOWNLOADS))
    _queries: OrderedDict[str, _Query] = field(default_factory=OrderedDict, init=False)
    _reads: dict[str, _ReadBatch] = field(default_factory=dict, init=False)
    _next_batch: _ReadBatch | None = field(default=None, init=False)
    _subscribed: dict[str, tuple[TaskReference, str]] = field(default_factory=dict, init=False)
    _verifications: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)

    async def read(self, tenant: Tenant, task_id: str, *, wait_seconds: float = 0) -> CachedTask:
        """Return a task of the tenant, once it has ended or after `wait_seconds`.

        Raises NotFound (also for another tenant's task or an altered id), UpstreamUnavailable if neither Redis nor the
        upstream answers, and Overloaded if too many clients wait.
        """
        reference = self.decode_id(tenant, task_id)
        if not wait_seconds:
            return await self._read_task(reference, task_id)
        with self._subscribe(reference, task_id) as subscription:
            cached, deadline = await self._read_task(reference, task_id), time.monotonic() + wait_seconds
            while not cached.task.state.is_final:
                change = await subscription.wait_for_change(cached.task.version, deadline - time.monotonic())
                if change is None:
                    break
                cached = change
            return cached

    def read_cached(self, tenant: Tenant, task_id: str) -> CachedTask | None:
        """Return a task of the tenant if it is fresh in memory. Raises NotFound."""
        return self._find_fresh(self.decode_id(tenant, task_id), task_id)

    async def stream_changes(
        self, tenant: Tenant, task_id: str, *, after_version: int, max_seconds: float
    ) -> AsyncGenerator[CachedTask | None, None]:
        """Yield a task later than `after_version`, then each change, until its end or `max_seconds`.

        The first item comes at once; None stands for no change. Raises as `read` does, before the first item.
        """
        reference = self.decode_id(tenant, task_id)
        deadline = time.monotonic() + max_seconds
        with self._subscribe(reference, task_id) as subscription:
            cached = await self._read_task(reference, task_id)
            yield cached if cached.task.version > after_version or cached.task.state.is_final else None
            while not cached.task.state.is_final and not self.cache.is_closed:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return
                change = await subscription.wait_for_change(cached.task.version, min(HEARTBEAT_SECONDS, remaining))
                cached = change or cached
                yield change

    @asynccontextmanager
    async def open_artifact(
        self, tenant: Tenant, task_id: str, name: str, range_request: RangeRequest
    ) -> AsyncIterator[tuple[Task, ArtifactStream]]:
        """Open a result at the vendor's URL within the block.

        Raises before the block: NotFound if there is no such result (yet), Overloaded if too many are open, else as
        `read` and FetchArtifact do.
        """
        cached = await self.read(tenant, task_id)
        if not cached.task.state.is_final:  # another process, which told the client, may know its end before this one
            cached = await self._read_stored(self.decode_id(tenant, task_id), task_id)
        task = cached.task
        artifact = _find_artifact(task, name)
        account = self.registry.current.account_by_id(task.account)
        with self.downloads.hold(tenant.id):
            async with self.fetch_artifact(account, artifact, range_request, _ended_recently(cached)) as stream:
                yield task, stream

    def decode_id(self, tenant: Tenant, task_id: str) -> TaskReference:
        """Decode the id of a task of this tenant. Raises NotFound."""
        reference = self.task_ids.decode(task_id)
        if reference.tenant != tenant.id:
            raise _task_not_found()
        return reference

    async def touch_watched(self) -> None:
        """Keep subscribed tasks checked often, for ever; read them too, in case a change was missed.

        Tasks that the store lost are recreated, so that their end is noticed.
        """
        while True:
            await asyncio.sleep(self.interval_seconds)
            ids = self.cache.subscribed_ids()
            for start in range(0, len(ids), _BATCH_SIZE):
                batch = ids[start : start + _BATCH_SIZE]
                try:
                    tasks = await self.tasks.touch(batch, is_awaited=True)
                except LedgerUnavailable:
                    break
                for reservation, stored in zip(batch, tasks, strict=True):
                    if stored:
                        self.cache.put(*stored)
                    elif reservation in self._subscribed:
                        self._start_verification(*self._subscribed[reservation])

    @contextmanager
    def _subscribe(self, reference: TaskReference, task_id: str) -> Iterator[Subscription]:
        reservation = reference.reservation
        with self.waits.hold(reference.tenant), self.cache.subscribe(reservation) as subscription:
            self._subscribed[reservation] = reference, task_id
            try:
                yield subscription
            finally:
                if self.cache.count_subscriptions(reservation) == 1:
                    del self._subscribed[reservation]

    async def _read_task(self, reference: TaskReference, task_id: str) -> CachedTask:
        return self._find_fresh(reference, task_id) or await self._read_stored(reference, task_id)

    async def _read_stored(self, reference: TaskReference, task_id: str) -> CachedTask:
        can_recreate = True
        try:
            stored = await self._touch_shared(reference.reservation)
        except LedgerUnavailable:
            stored, can_recreate = None, False
        if stored:
            self.metrics.reads_by_source[ReadSource.STORE].inc()
            cached = self.cache.put(*stored)
            if cached.task.state.is_final and not stored[0].state.is_final:
                self._start_verification(reference, task_id)
            return cached
        self.metrics.reads_by_source[ReadSource.UPSTREAM].inc()
        return await self._query_upstream(reference, task_id, can_recreate=can_recreate)

    def _find_fresh(self, reference: TaskReference, task_id: str) -> CachedTask | None:
        cached = self.cache.get_fresh(reference.reservation)
        if cached is None:
            return None
        self.metrics.reads_by_source[ReadSource.MEMORY].inc()
        if self.cache.claim_verification(reference.reservation):
            self._start_verification(reference, task_id)
        return cached

    def _start_verification(self, reference: TaskReference, task_id: str) -> None:
        """Make the store know a task or its end again, in the background, once at a time."""
        reservation = reference.reservation
        if reservation not in self._verifications:
            verification = self._verifications[reservation] = asyncio.create_task(self._verify(reference, task_id))
            verification.add_done_callback(lambda _: self._verifications.pop(reservation))

    async def _verify(self, reference: TaskReference, task_id: str) -> None:
        try:
            stored = await self._touch_shared(reference.reservation)
            if stored:
                self.cache.put(*stored)
            if stored is None or not stored[0].state.is_final:
                await self._query_upstream(reference, task_id, can_recreate=True)
        except GatewayError:  # the next read repeats it
            pass
        except Exception:  # noqa: BLE001 - the task is not awaited
            _log.exception("task.restore_failed", reservation=reference.reservation)

    async def _touch_shared(self, reservation: str) -> tuple[Task, int] | None:
        """Read a task in one call with all that are read in this iteration of the loop, or are being read."""
        batch = self._reads.get(reservation)
        if batch is None:
            batch = self._next_batch
            if batch is None or len(batch.rows) >= _BATCH_SIZE:
                batch = self._next_batch = _ReadBatch({})
                batch.reading = asyncio.create_task(self._read_batch(batch))
            batch.rows[reservation] = None
            self._reads[reservation] = batch
        try:
            await asyncio.shield(cast("asyncio.Task[None]", batch.reading))
        except GatewayError:
            raise
        except Exception:
            if len(batch.rows) == 1:
                raise
            # One that can't be decoded must not fail the others.
            (row,) = await self.tasks.touch([reservation])
            return row
        return batch.rows[reservation]

    async def _read_batch(self, batch: _ReadBatch) -> None:
        if self._next_batch is batch:
            self._next_batch = None
        try:
            rows = await self.tasks.touch(list(batch.rows))
            batch.rows = dict(zip(batch.rows, rows, strict=True))
        finally:
            batch.reading = None  # it holds the batch
            for reservation in batch.rows:
                del self._reads[reservation]

    async def _query_upstream(self, reference: TaskReference, task_id: str, *, can_recreate: bool) -> CachedTask:
        """Query the upstream for a lost task, once per task and interval."""
        query = self._queries.get(reference.reservation)
        if query is None or (query.check.done() and time.monotonic() - query.started_at >= self.interval_seconds):
            query = _Query(time.monotonic(), asyncio.ensure_future(self._send_check(reference)))
            self._queries[reference.reservation] = query
            self._queries.move_to_end(reference.reservation)
            while len(self._queries) > _MAX_QUERIES:
                self._queries.popitem(last=False)
        with upstream_wait():  # for all readers that share the query
            check = await asyncio.shield(query.check)
        # The upstream's "not found or of unknown state" can pass, and a new task may not be settled yet.
        is_new = self.now() - reference.created_at / 1000 < NEW_TASK_SECONDS
        if check.outcome in {CheckOutcome.NO_RESPONSE, CheckOutcome.INVALID} or (
            check.outcome is CheckOutcome.NOT_FOUND and (is_new or not can_recreate)
        ):
            raise UpstreamUnavailable(
                "This task can't be read at the moment. Try again.", retry_after=self.interval_seconds
            )
        if check.outcome is CheckOutcome.NOT_FOUND:
            raise _task_not_found()
        if can_recreate and await self._recreate_reservation(reference, task_id):
            await self._record_end(reference, check)
        cached = self.cache.latest(reference.reservation)
        if cached is None:
            task = new_task(  # the id does not contain the options
                reference, task_id, state=State.RUNNING, options=_EMPTY_JSON, metadata=_EMPTY_JSON, version=0
            )
            cached = CachedTask(task, reference.created_at, query.started_at)
        if cached.task.state.is_final and cached.is_recorded:  # recorded meanwhile
            return cached
        task = _apply_check(cached.task, check, cached.known_at)
        if task.state.is_final:  # kept as final until the store has recorded the end
            self.cache.put(task, cached.known_at, is_recorded=False)
        return CachedTask(task, cached.known_at, query.started_at)

    async def _send_check(self, reference: TaskReference) -> CheckResult:
        account = self.registry.current.account_by_id(reference.account)
        if account is None:
            return CheckResult(outcome=CheckOutcome.NOT_FOUND)
        return await self.upstream.check(account, reference.upstream_id)

    async def _record_end(self, reference: TaskReference, check: CheckResult) -> None:
        """Record an end before it is returned, so that no other process shows the task as running afterwards."""
        if check.outcome not in {CheckOutcome.SUCCEEDED, CheckOutcome.FAILED}:
            return
        try:
            stored = await self.tasks.get(reference.reservation)
            if stored is None or stored[0].state.is_final:
                return
            # The ledger time of the query is unknown, but later than this.
            recorded = await self.tasks.record_check(
                ClaimedCheck(stored[0], reference.created_at, reference.created_at), check
            )
        except LedgerUnavailable:
            return  # the poller records it
        if recorded:
            self.cache.put(*recorded)
            report_end(recorded[0], self.registry.current, self.metrics)

    async def _recreate_reservation(self, reference: TaskReference, task_id: str) -> bool:
        """Settle a lost reservation as accepted, so that it is polled again; return whether that succeeded.

        Not beyond the age at which the ledger itself forgets: it would count twice.
        """
        if self.now() - reference.created_at / 1000 >= MAX_RECREATE_AGE_SECONDS:
            return False
        tenant = self.registry.current.tenant_by_id(reference.tenant)
        settlement = Settlement(
            reservation=reference.reservation,
            tenant=reference.tenant,
            account=reference.account,
            kind=reference.kind,
            created_at=reference.created_at,
            outcome=ReservationState.ACCEPTED,
            new_task=NewTask(task_id, _EMPTY_JSON, _EMPTY_JSON, tenant.webhook.url if tenant else None),
            is_late=True,
        )
        try:
            booked = await self.ledger.settle(settlement)
        except LedgerUnavailable:
            return False  # the next read repeats it
        log_settlement(self.registry.current, settlement, source=READER, booked=booked)
        return True


def _task_not_found() -> NotFound:
    return NotFound("There is no such task.")


def _apply_check(task: Task, check: CheckResult, now: int) -> Task:
    """Apply a check to a task; its cost stays unknown until the ledger has it."""
    state = {CheckOutcome.SUCCEEDED: State.SUCCEEDED, CheckOutcome.FAILED: State.FAILED}.get(
        check.outcome, State.RUNNING
    )
    return msgspec.structs.replace(task, state=state, artifacts=check.artifacts, error=check.error, last_checked_at=now)


def _ended_recently(cached: CachedTask) -> bool:
    finished_at = cached.task.finished_at or cached.task.updated_at
    return (cached.known_at - finished_at) / 1000 + time.monotonic() - cached.monotonic_at < RECENT_END_SECONDS


def _find_artifact(task: Task, name: str) -> Artifact:
    if not task.state.is_final:
        raise NotFound("This task has not ended and has no results yet.")
    if task.state is State.FAILED:
        raise NotFound("This task has failed, so it has no results.")
    for artifact in task.artifacts:
        if artifact.name == name:
            return artifact
    raise NotFound(
        f"This task has no result of that name; it has {', '.join(artifact.name for artifact in task.artifacts)}."
    )
