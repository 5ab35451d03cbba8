"""Reading, waiting for and following tasks, and opening their results."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import msgspec
import structlog
from msgspec import Struct

from service.domain.errors import GatewayError, LedgerUnavailable, NotFound, UpstreamUnavailable
from service.domain.ledger import ReservationState
from service.domain.tasks import Artifact, Cost, CostBasis, Kind, State, Task, TaskIdCodec, TaskReference
from service.domain.tenants import Tenant
from service.telemetry.logging import upstream_wait
from service.telemetry.metrics import Metrics, ReadSource
from service.usecases.poller import report_end
from service.usecases.ports import (
    Artifacts,
    ArtifactStream,
    CheckOutcome,
    CheckResult,
    ClaimedCheck,
    Ledger,
    NewTask,
    RangeRequest,
    RegistryView,
    Settlement,
    TaskPage,
    TaskStore,
    Upstream,
)
from service.usecases.settlement import READER, log_settlement
from service.usecases.task_cache import CachedTask, Subscription, TaskCache

_log = structlog.get_logger(__name__)


HEARTBEAT_SECONDS = 15.0
"""Who follows changes is told after so many seconds that there was none."""


_MAX_QUERIES = 10_000


_BATCH_SIZE = 100


MAX_RECREATE_AGE_SECONDS = 30 * 86_400
"""A lost task is booked for so long after its creation: whatever the settings say, its reservation is kept longer."""


_EMPTY_JSON = msgspec.Raw(b"{}")


class _Query(Struct):
    """A look-up at the upstream, shared by all who ask within an interval."""

    started_at: float
    check: asyncio.Future[CheckResult]


class TaskReader:
    """Reads one task or waits for it, or lists a tenant's."""

    def __init__(
        self,
        *,
        tasks: TaskStore,
        ledger: Ledger,
        upstream: Upstream,
        registry: RegistryView,
        task_ids: TaskIdCodec,
        cache: TaskCache,
        now: Callable[[], float],
        metrics: Metrics,
        interval_seconds: float,
    ) -> None:
        self._metrics = metrics
        self._cache = cache
        self._tasks = tasks
        self._ledger = ledger
        self._upstream = upstream
        self._registry = registry
        self._task_ids = task_ids
        self._now = now
        self._interval_seconds = interval_seconds
        self._queries: OrderedDict[str, _Query] = OrderedDict()
        self._reads: dict[str, asyncio.Task[Sequence[tuple[Task, int] | None]]] = {}
        self._subscribed: dict[str, tuple[TaskReference, str]] = {}
        self._verifications: dict[str, asyncio.Task[None]] = {}

    async def read(self, tenant: Tenant, task_id: str, *, wait_seconds: float = 0) -> CachedTask:
        """A task of this tenant, as soon as it has ended but after `wait` seconds at the latest.

        Raises NotFound for a task of somebody else, an altered id, or one that nobody knows; UpstreamUnavailable if
        neither Redis nor the upstream can tell; Overloaded if too many wait already.
        """
        reference = self.decode_id(tenant, task_id)
        if not wait_seconds:
            return await self._read_task(reference, task_id)
        with self._subscribe(reference, task_id) as watcher:
            seen, deadline = await self._read_task(reference, task_id), time.monotonic() + wait_seconds
            while not seen.task.state.is_final:
                changed = await watcher.wait_for_change(seen.task.version, deadline - time.monotonic())
                if changed is None:
                    break
                seen = changed
            return seen

    async def stream_changes(
        self, tenant: Tenant, task_id: str, *, after_version: int, max_seconds: float
    ) -> AsyncGenerator[CachedTask | None, None]:
        """A task if it is later than version `after` or has ended, then each change, until its end.

        For so many seconds at the longest, or until the process ends. None stands for a while in which nothing
        happened; the first item comes at once in any case. Raises as `read` does, instead of the first item.
        """
        reference = self.decode_id(tenant, task_id)
        deadline = time.monotonic() + max_seconds
        with self._subscribe(reference, task_id) as watcher:
            seen = await self._read_task(reference, task_id)
            yield seen if seen.task.version > after_version or seen.task.state.is_final else None
            while not seen.task.state.is_final and not self._cache.is_closed:
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                changed = await watcher.wait_for_change(seen.task.version, min(HEARTBEAT_SECONDS, left))
                seen = changed or seen
                yield changed

    def decode_id(self, tenant: Tenant, task_id: str) -> TaskReference:
        """What the id of a task of this tenant stands for. Raises NotFound for any other."""
        reference = self._task_ids.decode(task_id)
        if reference.tenant != tenant.id:
            raise _task_not_found()
        return reference

    async def touch_watched(self) -> None:
        """Keep the tasks that are waited for in sight for ever: checked often, and read even if a change was missed.

        Those that the store has lost are booked again, so that their end is noticed.
        """
        while True:
            await asyncio.sleep(self._interval_seconds)
            waited_for = self._cache.subscribed_ids()
            for start in range(0, len(waited_for), _BATCH_SIZE):
                batch = waited_for[start : start + _BATCH_SIZE]
                try:
                    found = await self._tasks.touch(batch)
                except LedgerUnavailable:
                    break
                for reservation, each in zip(batch, found, strict=True):
                    if each:
                        self._cache.put(*each)
                    elif reservation in self._subscribed:
                        self._start_verification(*self._subscribed[reservation])

    @contextmanager
    def _subscribe(self, reference: TaskReference, task_id: str) -> Iterator[Subscription]:
        """A watcher of a task, which is looked up if the store has lost it."""
        reservation = reference.reservation
        with self._cache.subscribe(reservation) as watcher:
            self._subscribed[reservation] = reference, task_id
            try:
                yield watcher
            finally:
                if self._cache.count_subscriptions(reservation) == 1:
                    del self._subscribed[reservation]

    async def _read_task(self, reference: TaskReference, task_id: str) -> CachedTask:
        if seen := self._cache.get_fresh(reference.reservation):
            self._metrics.record_task_read(ReadSource.MEMORY)
            if self._cache.claim_verification(reference.reservation):
                self._start_verification(reference, task_id)
            return seen
        book = True
        try:
            (found,) = await self._touch_shared(reference.reservation)
        except LedgerUnavailable:
            found, book = None, False
        if found:
            self._metrics.record_task_read(ReadSource.STORE)
            seen = self._cache.put(*found)
            if seen.task.state.is_final and not found[0].state.is_final:
                self._start_verification(reference, task_id)
            return seen
        self._metrics.record_task_read(ReadSource.UPSTREAM)
        return await self._query_upstream(reference, task_id, can_recreate=book)

    def _start_verification(self, reference: TaskReference, task_id: str) -> None:
        """Have the store know a task again if it has lost it, or its end; in the background, once at a time."""
        reservation = reference.reservation
        if reservation not in self._verifications:
            verifying = self._verifications[reservation] = asyncio.create_task(self._verify(reference, task_id))
            verifying.add_done_callback(lambda _: self._verifications.pop(reservation))

    async def _verify(self, reference: TaskReference, task_id: str) -> None:
        try:
            (found,) = await self._touch_shared(reference.reservation)
            if found:
                self._cache.put(*found)
            if found is None or not found[0].state.is_final:
                await self._query_upstream(reference, task_id, can_recreate=True)
        except GatewayError:  # the next read or look does it
            pass
        except Exception:  # noqa: BLE001 - nobody awaits it
            _log.exception("task.restore_failed", reservation=reference.reservation)

    async def _touch_shared(self, reservation: str) -> Sequence[tuple[Task, int] | None]:
        """Read a task; all who ask while that is under way share it, so that a crowd costs one call."""
        reading = self._reads.get(reservation)
        if reading is None:
            reading = self._reads[reservation] = asyncio.ensure_future(self._tasks.touch([reservation]))
            reading.add_done_callback(lambda _: self._reads.pop(reservation))
        return await asyncio.shield(reading)

    async def list_tasks(
        self, tenant: Tenant, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> TaskPage:
        """A tenant's tasks, newest first. Raises LedgerUnavailable, or MalformedRequest for a wrong cursor."""
        return await self._tasks.list_page(tenant.id, state=state, kind=kind, limit=limit, cursor=cursor)

    async def _query_upstream(self, reference: TaskReference, task_id: str, *, can_recreate: bool) -> CachedTask:
        """Ask the upstream, once per task and interval, about a task that only its id is left of."""
        asked = self._queries.get(reference.reservation)
        if asked is None or (asked.check.done() and time.monotonic() - asked.started_at >= self._interval_seconds):
            asked = _Query(time.monotonic(), asyncio.ensure_future(self._send_check(reference)))
            self._queries[reference.reservation] = asked
            self._queries.move_to_end(reference.reservation)
            while len(self._queries) > _MAX_QUERIES:
                self._queries.popitem(last=False)
        with upstream_wait():  # whoever began it
            check = await asyncio.shield(asked.check)
        if check.outcome in {CheckOutcome.NO_RESPONSE, CheckOutcome.INVALID} or (
            check.outcome is CheckOutcome.NOT_FOUND and not can_recreate
        ):
            raise UpstreamUnavailable(
                "This task can't be looked up just now. Try again.", retry_after=self._interval_seconds
            )
        if check.outcome is CheckOutcome.NOT_FOUND:
            raise _task_not_found()
        if can_recreate and await self._recreate_reservation(reference, task_id):
            await self._record_end(reference, check)
        known = self._cache.latest(reference.reservation)
        if known is None:
            known = CachedTask(_task_from_id(reference, task_id), reference.created_at, asked.started_at)
        if known.task.state.is_final and known.is_recorded:  # it came to be known meanwhile
            return known
        task = _apply_check(known.task, check, known.known_at)
        if task.state.is_final:  # so it stays, whatever the store says of it until it has heard of the end
            self._cache.put(task, known.known_at, is_recorded=False)
        return CachedTask(task, known.known_at, asked.started_at)

    async def _send_check(self, reference: TaskReference) -> CheckResult:
        account = self._registry.current.account_by_id(reference.account)
        if account is None:
            return CheckResult(outcome=CheckOutcome.NOT_FOUND)
        return await self._upstream.check(account, reference.upstream_id)

    async def _record_end(self, reference: TaskReference, check: CheckResult) -> None:
        """Record an end before it is shown, so that no other process shows the task as running afterwards."""
        if check.outcome not in {CheckOutcome.SUCCEEDED, CheckOutcome.FAILED}:
            return
        try:
            found = await self._tasks.get(reference.reservation)
            if found is None or found[0].state.is_final:
                return
            # When the upstream was asked is not known in the ledger's time: certainly later than this.
            recorded = await self._tasks.record_check(
                ClaimedCheck(found[0], reference.created_at, reference.created_at), check
            )
        except LedgerUnavailable:
            return  # the watch does it
        if recorded:
            self._cache.put(*recorded)
            report_end(recorded[0], self._registry.current, self._metrics)

    async def _recreate_reservation(self, reference: TaskReference, task_id: str) -> bool:
        """Book a task the ledger has lost: it was accepted, and the watch shall go on with it. False if that fails.

        Not one that is as old as what the ledger forgets by itself, which would be booked twice.
        """
        if self._now() - reference.created_at / 1000 >= MAX_RECREATE_AGE_SECONDS:
            return False
        tenant = self._registry.current.tenant_by_id(reference.tenant)
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
            booked = await self._ledger.settle(settlement)
        except LedgerUnavailable:
            return False  # the next read does it
        log_settlement(self._registry.current, settlement, source=READER, booked=booked)
        return True


def _task_not_found() -> NotFound:
    return NotFound("There is no such task.")


def _apply_check(task: Task, check: CheckResult, now: int) -> Task:
    """A task with what an answer of the upstream tells of it. What it took is not known before the ledger books it."""
    state = {CheckOutcome.SUCCEEDED: State.SUCCEEDED, CheckOutcome.FAILED: State.FAILED}.get(
        check.outcome, State.RUNNING
    )
    return msgspec.structs.replace(task, state=state, artifacts=check.artifacts, error=check.error, last_checked_at=now)


def _task_from_id(reference: TaskReference, task_id: str) -> Task:
    """What an id tells of a task: its options are not among it."""
    return Task(
        id=task_id,
        reservation=reference.reservation,
        tenant=reference.tenant,
        account=reference.account,
        kind=reference.kind,
        state=State.RUNNING,
        created_at=reference.created_at,
        updated_at=reference.created_at,
        finished_at=None,
        options=_EMPTY_JSON,
        metadata=_EMPTY_JSON,
        artifacts=(),
        error=None,
        cost=Cost(0, 0, CostBasis.UNKNOWN),
        version=0,
        last_checked_at=reference.created_at,
    )


RECENT_END_SECONDS = 300.0
"""For so long after a task's end its results may not have arrived where the upstream keeps them."""


class ArtifactReader:
    """Fetches a result for the tenant whose task it is of, from the address that the upstream gave for it."""

    def __init__(self, *, reader: TaskReader, artifacts: Artifacts, registry: RegistryView) -> None:
        self._reader = reader
        self._artifacts = artifacts
        self._registry = registry

    @asynccontextmanager
    async def open_artifact(
        self, tenant: Tenant, task_id: str, name: str, range_request: RangeRequest
    ) -> AsyncIterator[tuple[Task, ArtifactStream]]:
        """A task with one of its results, which is fetched as long as the block lasts.

        Raises before the block: NotFound also for a task that has no such result, or none yet; else as
        `Follow.read` and `Artifacts.fetch` do.
        """
        seen = await self._reader.read(tenant, task_id)
        task = seen.task
        artifact = _find_artifact(task, name)
        account = self._registry.current.account_by_id(task.account)
        async with self._artifacts.fetch(account, artifact, range_request, is_recent=_ended_recently(seen)) as fetched:
            yield task, fetched


def _ended_recently(seen: CachedTask) -> bool:
    ended = seen.task.finished_at or seen.task.updated_at
    return (seen.known_at - ended) / 1000 + time.monotonic() - seen.monotonic_at < RECENT_END_SECONDS


def _find_artifact(task: Task, name: str) -> Artifact:
    if not task.state.is_final:
        raise NotFound("This task has not ended yet, and has no results before. Follow it until it has.")
    if task.state is State.FAILED:
        raise NotFound("This task has failed, so it has no results.")
    for artifact in task.artifacts:
        if artifact.name == name:
            return artifact
    raise NotFound(f"This task has no result of that name; it has {', '.join(each.name for each in task.artifacts)}.")
