"""Reading, waiting for and following tasks, and opening their results."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import msgspec
import structlog
from msgspec import Struct

from service.domain.errors import GatewayError, LedgerUnavailable, NotFound, UpstreamUnavailable
from service.domain.ledger import ReservationState
from service.domain.tasks import Artifact, Basis, Cost, Kind, Reference, State, Task, TaskIds
from service.domain.tenants import Tenant
from service.telemetry.logging import waiting
from service.telemetry.metrics import Metrics, Source
from service.usecases.poller import report_end
from service.usecases.ports import (
    Answered,
    Artifacts,
    Asked,
    Check,
    Clock,
    Due,
    Fetched,
    Ledger,
    Page,
    RegistryView,
    Settlement,
    TaskDraft,
    Tasks,
    Upstream,
)
from service.usecases.settlement import READER, tell
from service.usecases.task_cache import Board, Seen, Watcher

_log = structlog.get_logger(__name__)


HEARTBEAT_SECONDS = 15.0
"""Who follows changes is told after so many seconds that there was none."""


_REMEMBERED = 10_000


_BATCH = 100


BOOKED_WITHIN_SECONDS = 30 * 86_400
"""A lost task is booked for so long after its creation: whatever the settings say, its reservation is kept longer."""


_EMPTY = msgspec.Raw(b"{}")


class _Asked(Struct):
    """A look-up at the upstream, shared by all who ask within an interval."""

    at: float
    answer: asyncio.Future[Check]


class Follow:
    """Reads one task or waits for it, or lists a tenant's."""

    def __init__(
        self,
        *,
        tasks: Tasks,
        ledger: Ledger,
        upstream: Upstream,
        registry: RegistryView,
        task_ids: TaskIds,
        board: Board,
        clock: Clock,
        metrics: Metrics,
        interval: float,
    ) -> None:
        self._metrics = metrics
        self._board = board
        self._tasks = tasks
        self._ledger = ledger
        self._upstream = upstream
        self._registry = registry
        self._task_ids = task_ids
        self._clock = clock
        self._interval = interval
        self._asked: OrderedDict[str, _Asked] = OrderedDict()
        self._reading: dict[str, asyncio.Task[Sequence[tuple[Task, int] | None]]] = {}
        self._watched: dict[str, tuple[Reference, str]] = {}
        self._verifying: dict[str, asyncio.Task[None]] = {}

    async def read(self, tenant: Tenant, task_id: str, *, wait: float = 0) -> Seen:
        """A task of this tenant, as soon as it has ended but after `wait` seconds at the latest.

        Raises NotFound for a task of somebody else, an altered id, or one that nobody knows; UpstreamUnavailable if
        neither Redis nor the upstream can tell; Overloaded if too many wait already.
        """
        reference = self.reference(tenant, task_id)
        if not wait:
            return await self._read(reference, task_id)
        with self._watching(reference, task_id) as watcher:
            seen, deadline = await self._read(reference, task_id), time.monotonic() + wait
            while not seen.task.state.ended:
                changed = await watcher.changed(seen.task.version, deadline - time.monotonic())
                if changed is None:
                    break
                seen = changed
            return seen

    async def changes(
        self, tenant: Tenant, task_id: str, *, after: int, seconds: float
    ) -> AsyncGenerator[Seen | None, None]:
        """A task if it is later than version `after` or has ended, then each change, until its end.

        For so many seconds at the longest, or until the process ends. None stands for a while in which nothing
        happened; the first item comes at once in any case. Raises as `read` does, instead of the first item.
        """
        reference = self.reference(tenant, task_id)
        deadline = time.monotonic() + seconds
        with self._watching(reference, task_id) as watcher:
            seen = await self._read(reference, task_id)
            yield seen if seen.task.version > after or seen.task.state.ended else None
            while not seen.task.state.ended and not self._board.closed:
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                changed = await watcher.changed(seen.task.version, min(HEARTBEAT_SECONDS, left))
                seen = changed or seen
                yield changed

    def reference(self, tenant: Tenant, task_id: str) -> Reference:
        """What the id of a task of this tenant stands for. Raises NotFound for any other."""
        reference = self._task_ids.open(task_id)
        if reference.tenant != tenant.id:
            raise _not_found()
        return reference

    async def attend(self) -> None:
        """Keep the tasks that are waited for in sight for ever: checked often, and read even if a change was missed.

        Those that the store has lost are booked again, so that their end is noticed.
        """
        while True:
            await asyncio.sleep(self._interval)
            waited_for = self._board.watched()
            for start in range(0, len(waited_for), _BATCH):
                batch = waited_for[start : start + _BATCH]
                try:
                    found = await self._tasks.attend(batch)
                except LedgerUnavailable:
                    break
                for reservation, each in zip(batch, found, strict=True):
                    if each:
                        self._board.post(*each)
                    elif reservation in self._watched:
                        self._verify(*self._watched[reservation])

    @contextmanager
    def _watching(self, reference: Reference, task_id: str) -> Iterator[Watcher]:
        """A watcher of a task, which is looked up if the store has lost it."""
        reservation = reference.reservation
        with self._board.watching(reservation) as watcher:
            self._watched[reservation] = reference, task_id
            try:
                yield watcher
            finally:
                if self._board.waits(reservation) == 1:
                    del self._watched[reservation]

    async def _read(self, reference: Reference, task_id: str) -> Seen:
        if seen := self._board.fresh(reference.reservation):
            self._metrics.read(Source.MEMORY)
            if self._board.to_verify(reference.reservation):
                self._verify(reference, task_id)
            return seen
        book = True
        try:
            (found,) = await self._attend_once(reference.reservation)
        except LedgerUnavailable:
            found, book = None, False
        if found:
            self._metrics.read(Source.STORE)
            seen = self._board.post(*found)
            if seen.task.state.ended and not found[0].state.ended:
                self._verify(reference, task_id)
            return seen
        self._metrics.read(Source.UPSTREAM)
        return await self._look_up(reference, task_id, book=book)

    def _verify(self, reference: Reference, task_id: str) -> None:
        """Have the store know a task again if it has lost it, or its end; in the background, once at a time."""
        reservation = reference.reservation
        if reservation not in self._verifying:
            verifying = self._verifying[reservation] = asyncio.create_task(self._verified(reference, task_id))
            verifying.add_done_callback(lambda _: self._verifying.pop(reservation))

    async def _verified(self, reference: Reference, task_id: str) -> None:
        try:
            (found,) = await self._attend_once(reference.reservation)
            if found:
                self._board.post(*found)
            if found is None or not found[0].state.ended:
                await self._look_up(reference, task_id, book=True)
        except GatewayError:  # the next read or look does it
            pass
        except Exception:  # noqa: BLE001 - nobody awaits it
            _log.exception("task.not-verified", reservation=reference.reservation)

    async def _attend_once(self, reservation: str) -> Sequence[tuple[Task, int] | None]:
        """Read a task; all who ask while that is under way share it, so that a crowd costs one call."""
        reading = self._reading.get(reservation)
        if reading is None:
            reading = self._reading[reservation] = asyncio.ensure_future(self._tasks.attend([reservation]))
            reading.add_done_callback(lambda _: self._reading.pop(reservation))
        return await asyncio.shield(reading)

    async def page(
        self, tenant: Tenant, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> Page:
        """A tenant's tasks, newest first. Raises LedgerUnavailable, or MalformedRequest for a wrong cursor."""
        return await self._tasks.page(tenant.id, state=state, kind=kind, limit=limit, cursor=cursor)

    async def _look_up(self, reference: Reference, task_id: str, *, book: bool) -> Seen:
        """Ask the upstream, once per task and interval, about a task that only its id is left of."""
        asked = self._asked.get(reference.reservation)
        if asked is None or (asked.answer.done() and time.monotonic() - asked.at >= self._interval):
            asked = _Asked(time.monotonic(), asyncio.ensure_future(self._ask(reference)))
            self._asked[reference.reservation] = asked
            self._asked.move_to_end(reference.reservation)
            while len(self._asked) > _REMEMBERED:
                self._asked.popitem(last=False)
        with waiting():  # whoever began it
            check = await asyncio.shield(asked.answer)
        if check.answered in {Answered.NOTHING, Answered.UNUSABLE} or (check.answered is Answered.SILENT and not book):
            raise UpstreamUnavailable("This task can't be looked up just now. Try again.", retry_after=self._interval)
        if check.answered is Answered.SILENT:
            raise _not_found()
        if book and await self._settle_late(reference, task_id):
            await self._record_end(reference, check)
        known = self._board.newest(reference.reservation)
        if known is None:
            known = Seen(_bare(reference, task_id), reference.created, asked.at)
        if known.task.state.ended and known.recorded:  # it came to be known meanwhile
            return known
        task = _told(known.task, check, known.now)
        if task.state.ended:  # so it stays, whatever the store says of it until it has heard of the end
            self._board.post(task, known.now, recorded=False)
        return Seen(task, known.now, asked.at)

    async def _ask(self, reference: Reference) -> Check:
        account = self._registry.current.account(reference.account)
        if account is None:
            return Check(answered=Answered.SILENT)
        return await self._upstream.check(account, reference.upstream_id)

    async def _record_end(self, reference: Reference, check: Check) -> None:
        """Record an end before it is shown, so that no other process shows the task as running afterwards."""
        if check.answered not in {Answered.SUCCEEDED, Answered.FAILED}:
            return
        try:
            found = await self._tasks.get(reference.reservation)
            if found is None or found[0].state.ended:
                return
            # When the upstream was asked is not known in the ledger's time: certainly later than this.
            recorded = await self._tasks.record(Due(found[0], reference.created, reference.created), check)
        except LedgerUnavailable:
            return  # the watch does it
        if recorded:
            self._board.post(*recorded)
            report_end(recorded[0], self._registry.current, self._metrics)

    async def _settle_late(self, reference: Reference, task_id: str) -> bool:
        """Book a task the ledger has lost: it was accepted, and the watch shall go on with it. False if that fails.

        Not one that is as old as what the ledger forgets by itself, which would be booked twice.
        """
        if self._clock.now() - reference.created / 1000 >= BOOKED_WITHIN_SECONDS:
            return False
        tenant = self._registry.current.tenant(reference.tenant)
        settlement = Settlement(
            reservation=reference.reservation,
            tenant=reference.tenant,
            account=reference.account,
            kind=reference.kind,
            created=reference.created,
            outcome=ReservationState.ACCEPTED,
            draft=TaskDraft(task_id, _EMPTY, _EMPTY, tenant.webhook.url if tenant else None),
            late=True,
        )
        try:
            booked = await self._ledger.settle(settlement)
        except LedgerUnavailable:
            return False  # the next read does it
        tell(self._registry.current, settlement, by=READER, booked=booked)
        return True


def _not_found() -> NotFound:
    return NotFound("There is no such task.")


def _told(task: Task, check: Check, now: int) -> Task:
    """A task with what an answer of the upstream tells of it. What it took is not known before the ledger books it."""
    state = {Answered.SUCCEEDED: State.SUCCEEDED, Answered.FAILED: State.FAILED}.get(check.answered, State.RUNNING)
    return msgspec.structs.replace(task, state=state, artifacts=check.artifacts, error=check.error, checked=now)


def _bare(reference: Reference, task_id: str) -> Task:
    """What an id tells of a task: its options are not among it."""
    return Task(
        id=task_id,
        reservation=reference.reservation,
        tenant=reference.tenant,
        account=reference.account,
        kind=reference.kind,
        state=State.RUNNING,
        created=reference.created,
        updated=reference.created,
        finished=None,
        options=_EMPTY,
        metadata=_EMPTY,
        artifacts=(),
        error=None,
        cost=Cost(0, 0, Basis.UNKNOWN),
        version=0,
        checked=reference.created,
    )


RECENT_SECONDS = 300.0
"""For so long after a task's end its results may not have arrived where the upstream keeps them."""


class Fetch:
    """Fetches a result for the tenant whose task it is of, from the address that the upstream gave for it."""

    def __init__(self, *, follow: Follow, artifacts: Artifacts, registry: RegistryView) -> None:
        self._follow = follow
        self._artifacts = artifacts
        self._registry = registry

    @asynccontextmanager
    async def __call__(
        self, tenant: Tenant, task_id: str, name: str, asked: Asked
    ) -> AsyncIterator[tuple[Task, Fetched]]:
        """A task with one of its results, which is fetched as long as the block lasts.

        Raises before the block: NotFound also for a task that has no such result, or none yet; else as
        `Follow.read` and `Artifacts.fetch` do.
        """
        seen = await self._follow.read(tenant, task_id)
        task = seen.task
        artifact = _artifact(task, name)
        account = self._registry.current.account(task.account)
        async with self._artifacts.fetch(account, artifact, asked, recent=_is_recent(seen)) as fetched:
            yield task, fetched


def _is_recent(seen: Seen) -> bool:
    ended = seen.task.finished or seen.task.updated
    return (seen.now - ended) / 1000 + time.monotonic() - seen.at < RECENT_SECONDS


def _artifact(task: Task, name: str) -> Artifact:
    if not task.state.ended:
        raise NotFound("This task has not ended yet, and has no results before. Follow it until it has.")
    if task.state is State.FAILED:
        raise NotFound("This task has failed, so it has no results.")
    for artifact in task.artifacts:
        if artifact.name == name:
            return artifact
    raise NotFound(f"This task has no result of that name; it has {', '.join(each.name for each in task.artifacts)}.")
