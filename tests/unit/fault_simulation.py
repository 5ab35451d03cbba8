"""Gateway processes that share a faulty ledger and upstream and can be killed, in simulated time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from prometheus_client import CollectorRegistry

from service.crypto import Keyring, TaskIdCodec
from service.domain.ledger import Balance, Grant, ReservationState, Verdict
from service.domain.tasks import FaceEnhanceOptions, Options
from service.domain.tenants import Account, Tenant
from service.storage.ledger import KEEP_IDEMPOTENCY_KEY_MS
from service.telemetry.metrics import Metrics
from service.usecases.background import TaskSupervisor
from service.usecases.caches import CachedRegistry, CachedTask, DurationEstimator, TaskCache
from service.usecases.poller import TaskPoller
from service.usecases.ports import (
    CheckOutcome,
    CheckResult,
    Image,
    ReserveRequest,
    SubmitOutcome,
    SubmitResult,
    TenantSnapshot,
)
from service.usecases.settlement import SettlementQueue
from service.usecases.submit import LEASE_MARGIN_SECONDS, Submission, Submitter
from service.usecases.task_status import TaskReader
from tests.fakes import START, FakeClock
from tests.fakes.artifacts import FakeArtifacts
from tests.unit.faulty_store import CallQueue, FaultyStore, StoreConnection

IMAGE = Image(b"bytes", b"digest", "image/png", 3, 2)
FAILOVER_OUTCOMES = {
    SubmitOutcome.EXHAUSTED,
    SubmitOutcome.INVALID_ACCOUNT,
    SubmitOutcome.MISCONFIGURED,
    SubmitOutcome.NOT_SENT,
}
"""Only after these outcomes another account may be tried."""
_UNCHARGED_OUTCOMES = {*FAILOVER_OUTCOMES, SubmitOutcome.REJECTED, SubmitOutcome.REDIRECTED, SubmitOutcome.BUSY}
_NO_BALANCE = Balance()
_METRICS = Metrics(CollectorRegistry())


class _NonBlockingSelector(selectors.SelectSelector):
    """A selector that calls `on_idle` instead of blocking."""

    on_idle: Callable[[], None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self.on_idle()
        return super().select(0)


class _NumberedTask(asyncio.Task[Any]):
    """A task with a reproducible hash, since sets of tasks decide the order of cancellation."""

    def __init__(self, number: int, work: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> None:
        self._number = number
        super().__init__(work, loop=loop)

    def __hash__(self) -> int:
        return self._number


class ManualClockLoop(asyncio.SelectorEventLoop):
    """An event loop on a manual clock: `run_forever` ends when nothing is left to do at this time."""

    def __init__(self, clock: FakeClock) -> None:
        self._manual_clock = clock
        selector = _NonBlockingSelector()
        selector.on_idle = self.stop
        super().__init__(selector)
        numbers = count()
        self.set_task_factory(lambda loop, work: _NumberedTask(next(numbers), work, loop))

    def time(self) -> float:
        return (self._manual_clock.now_ms - START) / 1000


class LoopClock:
    """Replaces the module `time` where deadlines are computed."""

    @staticmethod
    def monotonic() -> float:
        return asyncio.get_running_loop().time()


class SequentialTokens:
    """Replaces the module `secrets` where reservations are named, for a reproducible order."""

    def __init__(self) -> None:
        self._counter = count()

    def token_hex(self, size: int) -> str:
        return f"{next(self._counter):0{2 * size}x}"


@dataclass(eq=False)
class UpstreamRequest:
    """An image passed to the upstream client; the outcome is None while it is unknown."""

    account: Account
    response: asyncio.Future[SubmitResult]
    outcome: SubmitOutcome | None = None


@dataclass(eq=False)
class Caller:
    """A caller that submits once, with its reservations, upstream requests and response."""

    tenant: Tenant
    process: GatewayProcess
    key: str | None = None
    reservation_ids: list[str] = field(default_factory=list)
    was_refused: bool = False
    requests: list[UpstreamRequest] = field(default_factory=list)
    response: asyncio.Task[Submission] = field(init=False)

    @property
    def outcome(self) -> SubmitOutcome | None:
        """The outcome of the last upstream request; NOT_SENT without any."""
        return self.requests[-1].outcome if self.requests else SubmitOutcome.NOT_SENT


_CALLER: ContextVar[Caller] = ContextVar("caller")
"""The caller of the current submission, inherited by the tasks it starts."""


class CallerConnection(StoreConnection):
    async def reserve(self, ask: ReserveRequest) -> tuple[Verdict, TenantSnapshot]:
        caller = _CALLER.get()
        caller.reservation_ids.append(ask.reservation)
        verdict, snapshot = await super().reserve(ask)
        caller.was_refused = not isinstance(verdict, Grant)
        return verdict, snapshot


class FaultyUpstream:
    """The upstream of all processes: submits stay pending until `respond`, checks return `check_results`."""

    def __init__(self, store: FaultyStore) -> None:
        self._store = store
        self.pending: list[UpstreamRequest] = []
        self._sent_by_key: dict[tuple[int, str], list[tuple[int, UpstreamRequest]]] = {}
        self.accepted_ids: list[str] = []
        self.check_results: dict[str, CheckResult] = {}

    async def submit(self, account: Account, options: Options, image: Image, *, timeout_seconds: float) -> SubmitResult:
        del options, image
        caller = _CALLER.get()
        caller.process.cancel_if_dead()
        request = UpstreamRequest(account, asyncio.get_running_loop().create_future())
        self._check_send(caller, request, timeout_seconds)
        caller.requests.append(request)
        if timeout_seconds <= 0:
            request.outcome = SubmitOutcome.NOT_SENT
            return SubmitResult(outcome=SubmitOutcome.NOT_SENT)
        self._check_key(caller, request)
        self.pending.append(request)
        caller.process.open_requests.append(request)
        try:
            async with asyncio.timeout(timeout_seconds):
                return await request.response
        except TimeoutError:
            request.outcome = SubmitOutcome.UNKNOWN
            return SubmitResult(outcome=SubmitOutcome.UNKNOWN)
        except asyncio.CancelledError:
            self._store.check_rule(caller.process.is_stopping, "sending was broken off though the process goes on")
            raise
        finally:
            caller.process.open_requests.remove(request)
            if request in self.pending:
                self.pending.remove(request)

    def respond(self, request: UpstreamRequest, outcome: SubmitOutcome | None, balance: Balance = _NO_BALANCE) -> None:
        """Respond to a submit; without an outcome, raise an internal error in the client."""
        if request.response.done():  # it timed out at the same time
            return
        self.pending.remove(request)
        request.outcome = outcome
        if outcome is None:
            request.response.set_exception(RuntimeError("a fault of ours"))
            return
        upstream_id = ""
        if outcome is SubmitOutcome.ACCEPTED:
            upstream_id = f"up-{len(self.accepted_ids)}"
            self.accepted_ids.append(upstream_id)
        request.response.set_result(SubmitResult(outcome=outcome, upstream_id=upstream_id, balance=balance))

    def _check_send(self, caller: Caller, request: UpstreamRequest, seconds: float) -> None:
        """Check that the account is reserved until after the timeout and that nothing was charged before."""
        expect = self._store.check_rule
        reservation = self._store.reservations.get(caller.reservation_ids[-1])
        expect(request.account not in [item.account for item in caller.requests], "an account was asked twice")
        expect(
            {item.outcome for item in caller.requests} <= FAILOVER_OUTCOMES,
            "sent again although it may have been charged",
        )
        if seconds > 0:
            place = (reservation.state, reservation.account) if reservation else None
            expect(place == (ReservationState.RESERVED, request.account.id), f"sent with a place on {place}")
            latest = self._store.clock.now_ms + (seconds + LEASE_MARGIN_SECONDS) * 1000
            expect(reservation is None or latest <= reservation.lease_expires_at + 1, "sending may outlast its lease")

    def _check_key(self, caller: Caller, request: UpstreamRequest) -> None:
        """Check that nothing is sent under a key after a possible charge while the key is kept."""
        if caller.key is None:
            return
        now, sent = self._store.clock.now_ms, self._sent_by_key.setdefault((caller.tenant.id, caller.key), [])
        charged = [
            item.outcome
            for at, item in sent
            if item.outcome not in _UNCHARGED_OUTCOMES
            and now < at + KEEP_IDEMPOTENCY_KEY_MS - self._store.retention.lease_ms
        ]
        self._store.check_rule(charged == [], "a key was sent again although it may have been charged")
        sent.append((now, request))

    async def check(self, account: Account, upstream_id: str) -> CheckResult:
        del account
        return self.check_results.get(upstream_id, CheckResult(outcome=CheckOutcome.RUNNING))


class GatewayProcess:
    def __init__(self, store: FaultyStore, post: CallQueue, upstream: FaultyUpstream, registry: CachedRegistry) -> None:
        self.is_dead = False
        self.is_stopping = False
        self.open_requests: list[UpstreamRequest] = []
        self.background = TaskSupervisor()
        self._connection = CallerConnection(store, post)
        task_ids = TaskIdCodec(Keyring([b"k" * 32]).derive("task-id"))
        self._submitter = Submitter(
            ledger=self._connection,
            settlements=SettlementQueue(self._connection, self.background, registry),
            tasks=self._connection,
            upstream=upstream,
            registry=registry,
            task_ids=task_ids,
            supervisor=self.background,
            metrics=_METRICS,
        )
        self._reader = TaskReader(
            tasks=self._connection,
            ledger=self._connection,
            upstream=upstream,
            fetch_artifact=FakeArtifacts().fetch,
            registry=registry,
            task_ids=task_ids,
            cache=TaskCache(DurationEstimator(0)),
            now=store.clock.now,
            metrics=_METRICS,
            interval_seconds=0,
        )
        watch = TaskPoller(
            tasks=self._connection,
            ledger=self._connection,
            upstream=upstream,
            registry=registry,
            task_ids=task_ids,
            cache=TaskCache(DurationEstimator(0)),
            metrics=_METRICS,
        )
        loop = asyncio.get_running_loop()
        self._poll_loops = [loop.create_task(watch.run()), loop.create_task(watch.expire_leases())]

    async def submit(self, caller: Caller) -> Submission:
        _CALLER.set(caller)
        return await self._submitter.submit(caller.tenant, FaceEnhanceOptions(), {}, IMAGE, idempotency_key=caller.key)

    async def read(self, tenant: Tenant, task_id: str) -> CachedTask:
        return await self._reader.read(tenant, task_id)

    def kill(self, *, runs_pending: bool) -> None:
        """Stop without finishing anything; pending calls still run if `runs_pending`."""
        self.is_dead = self.is_stopping = True
        self._connection.close(runs_pending=runs_pending)
        for request in self.open_requests:
            request.response.cancel()
        for task in self._poll_loops:
            task.cancel()

    async def stop(self, seconds: float) -> None:
        """Shut down: accept nothing new and drain for so many seconds."""
        self.is_stopping = True
        await self.background.drain(seconds)
        self.kill(runs_pending=True)

    def cancel_if_dead(self) -> None:
        """Raise CancelledError in code that continues after the process was killed."""
        if self.is_dead:
            raise asyncio.CancelledError
