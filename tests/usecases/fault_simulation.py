"""Gateway processes on one Redis ledger whose calls fail in every possible way, in simulated time.

Calls that change reservations stay pending until their outcome is chosen; calls of the poller and of readers run at
once. Rules that can be violated only during a call are checked during it.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from typing import Any, TypeVar

import msgspec
from prometheus_client import CollectorRegistry

from service.crypto import Keyring, TaskIdCodec
from service.domain.errors import LedgerUnavailable
from service.domain.ledger import AccountState, Balance, Grant, Reservation, ReservationState, TenantState, Verdict
from service.domain.tasks import FaceEnhanceOptions, Options, Task
from service.domain.tenants import Account, Registry, Tenant, TenantPolicy
from service.storage.connections import connect
from service.storage.ledger import KEEP_IDEMPOTENCY_KEY_MS, RedisLedger, Retention
from service.storage.redis import Keys, RedisScripts
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTaskStore
from service.telemetry.metrics import Metrics
from service.usecases.background import TaskSupervisor
from service.usecases.caches import CachedRegistry, CachedTask, DurationEstimator, TaskCache
from service.usecases.poller import TaskPoller
from service.usecases.ports import (
    CheckOutcome,
    CheckResult,
    Image,
    RegistryChange,
    ReserveRequest,
    Settlement,
    SubmitOutcome,
    SubmitResult,
    TenantSnapshot,
)
from service.usecases.settlement import SettlementQueue
from service.usecases.submit import LEASE_MARGIN_SECONDS, Submission, Submitter
from service.usecases.task_status import TaskReader
from tests.storage.seeded_store import RETENTION
from tests.support.server_time import install_server_time, set_server_time

T = TypeVar("T")

START_MS = 1_790_000_000_000
IMAGE = Image(b"bytes", b"digest", "image/png", 3, 2)
FAILOVER_OUTCOMES = {
    SubmitOutcome.EXHAUSTED,
    SubmitOutcome.INVALID_ACCOUNT,
    SubmitOutcome.MISCONFIGURED,
    SubmitOutcome.NOT_SENT,
}
"""Only after these outcomes another account may be tried."""
_FREE_OUTCOMES = {*FAILOVER_OUTCOMES, SubmitOutcome.REJECTED, SubmitOutcome.REDIRECTED, SubmitOutcome.BUSY}
_PROVISIONAL = {None, ReservationState.RESERVED, ReservationState.UNKNOWN}
_QUEUED_CALLS = {"reserve", "change_account", "settle"}
_NO_BALANCE = Balance()
_METRICS = Metrics(CollectorRegistry())


class _ManualSelector(selectors.DefaultSelector):
    """Blocks only while a call of the store is in progress; otherwise calls `on_idle` instead."""

    on_idle: Callable[[], None]
    calls_in_progress = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.calls_in_progress:
            return super().select(timeout)
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

    def __init__(self) -> None:
        self.now_ms = START_MS
        self.selector = _ManualSelector()
        self.selector.on_idle = self.stop
        super().__init__(self.selector)
        numbers = count()
        self.set_task_factory(lambda loop, work: _NumberedTask(next(numbers), work, loop))

    def time(self) -> float:
        return (self.now_ms - START_MS) / 1000


class CallOutcome(StrEnum):
    """What becomes of a call: after all but the first two, its caller gets an error."""

    DONE = "done"
    REPEATED = "it runs twice"
    LOST = "it never runs"
    UNANSWERED = "it runs"
    LATE = "it may run some time later"
    BROKEN = "it runs, but reserve and settle fail by an error of the gateway's own"


class StoredState(msgspec.Struct):
    """Everything in Redis at one moment."""

    reservations: dict[str, Reservation]
    tenants: Mapping[int, TenantState]
    accounts: Mapping[int, AccountState]
    tasks: dict[str, Task]

    def state_of(self, reservation: str) -> ReservationState | None:
        stored = self.reservations.get(reservation)
        return stored.state if stored else None


class ObservedLedger(RedisLedger):
    """The ledger in Redis; `violations` are broken rules, found without its own counters."""

    def __init__(self, scripts: RedisScripts, keys: Keys, retention: Retention) -> None:
        super().__init__(scripts, keys, retention)
        self.violations: list[str] = []
        self.unknown_reservations: set[str] = set()

    def check_rule(self, holds: bool, violation: str) -> None:
        """Record a violation; raised here, it would be handled like an error of the store."""
        if not holds:
            self.violations.append(violation)

    async def settle(self, settlement: Settlement) -> bool:
        name = settlement.reservation
        before = await self.get_reservation(name)
        booked = await super().settle(settlement)
        after = await self.get_reservation(name)
        assert after
        if after.state is ReservationState.UNKNOWN:
            self.unknown_reservations.add(name)
        is_allowed = (before and before.state) in _PROVISIONAL or (before and before.state is after.state)
        self.check_rule(bool(is_allowed), f"an outcome was final, but became {after.state}")
        return booked


class FaultyStore:
    """Redis with tenants and accounts, and the calls of all processes to it.

    `next_outcomes` are those of the next calls that run at once.
    """

    def __init__(self, url: str, loop: ManualClockLoop, tenants: list[Tenant], accounts: dict[str, Account]) -> None:
        install_server_time()
        self.loop, self.keys, self.retention = loop, Keys("faulty"), RETENTION
        self.connections = connect(url, timeout=5)
        self.client: Any = self.connections.commands
        scripts = RedisScripts(self.client)
        self.ledger = ObservedLedger(scripts, self.keys, self.retention)
        self.tasks = RedisTaskStore(scripts, self.keys, self.retention)
        self.is_unavailable = False
        self.tenant_ids = [tenant.id for tenant in tenants]
        self.account_ids = [account.id for account in accounts.values()]
        self.registry = CachedRegistry(RedisRegistry(scripts, self.keys))
        self.registry.current = Registry(1, 20, {tenant.name: tenant for tenant in tenants}, accounts)
        self.registry.is_ready = True
        self.pending: list[PendingCall] = []
        self.delayed: list[PendingCall] = []
        self.next_outcomes: list[CallOutcome] = []
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        await self.client.flushall()
        await set_server_time(self.client, self.keys, self.loop.now_ms)
        registry = self.registry.current
        await self._write(tenants=tuple(registry.tenants.values()), accounts=tuple(registry.accounts.values()))

    async def set_policy(self, tenant: Tenant, policy: TenantPolicy) -> None:
        """Set the policy of a tenant, and reopen all accounts."""
        await self._write(tenants=(msgspec.structs.replace(tenant, policy=policy),))
        for account in self.account_ids:
            await self.ledger.reopen_account(account)

    async def _write(self, **changes: Any) -> None:
        version = await self.registry.store.read_version()
        await self.registry.store.write(RegistryChange(version=version, next_id=20, **changes))

    async def set_time(self) -> None:
        await set_server_time(self.client, self.keys, self.loop.now_ms)

    async def execute(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a call, one after the other, for a reproducible order."""
        self.loop.selector.calls_in_progress += 1
        try:
            async with self._lock:
                return await work()
        finally:
            self.loop.selector.calls_in_progress -= 1

    async def read_state(self) -> StoredState:
        read, keys = self.client.get, self.keys
        prefix = keys.reservation("")
        names = [key.decode().removeprefix(prefix) async for key in self.client.scan_iter(prefix + "*")]
        packed = {name: await read(keys.reservation(name)) for name in sorted(names)}
        tenants, _ = await self.ledger.tenant_figures(self.tenant_ids)
        tasks = {name: await self.tasks.get(name) for name in names}
        return StoredState(
            {name: msgspec.msgpack.decode(item, type=Reservation) for name, item in packed.items()},
            {tenant: figures.state for tenant, figures in tenants.items()},
            await self.ledger.account_states(self.account_ids),
            {name: item[0] for name, item in tasks.items() if item},
        )

    async def resolve(self, call: PendingCall, outcome: CallOutcome) -> None:
        self.pending.remove(call)
        error: Exception | None = None
        result: Any = None
        try:
            if self.is_unavailable or outcome in {CallOutcome.LOST, CallOutcome.LATE}:
                raise LedgerUnavailable("no connection", retry_after=1)
            for _ in range(1 + (outcome is CallOutcome.REPEATED)):
                result = await self.execute(call.work)
            if outcome is CallOutcome.BROKEN and call.name in {"reserve", "settle"}:
                raise RuntimeError("a fault of ours")
            if outcome in {CallOutcome.UNANSWERED, CallOutcome.BROKEN}:
                raise LedgerUnavailable("no answer", retry_after=1)
        except (LedgerUnavailable, RuntimeError) as raised:
            error = raised
        if call.result.done():  # its process ended meanwhile
            return
        if error:
            call.result.set_exception(error)
        else:
            call.result.set_result(result)
        if outcome is CallOutcome.LATE:
            self.delayed.append(call)

    async def execute_delayed(self, call: PendingCall) -> None:
        self.delayed.remove(call)
        with suppress(LedgerUnavailable):
            await self.execute(call.work)


@dataclass(eq=False)
class PendingCall:
    name: str
    work: Callable[[], Coroutine[Any, Any, Any]]
    result: asyncio.Future[Any]


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


class StoreConnection:
    """Ledger and TaskStore as used by one process."""

    def __init__(self, store: FaultyStore) -> None:
        self._store = store
        self._open_calls: list[PendingCall] = []
        self._is_closed = False
        self._runs_pending = True

    def close(self, *, runs_pending: bool) -> None:
        """End the process: no new calls; pending ones are lost unless `runs_pending`."""
        self._is_closed, self._runs_pending = True, runs_pending
        for call in self._open_calls:
            call.result.cancel()

    async def reserve(self, request: ReserveRequest) -> tuple[Verdict, TenantSnapshot]:
        caller = _CALLER.get()
        caller.reservation_ids.append(request.reservation)
        verdict, snapshot = await self._call("reserve", request)
        caller.was_refused = not isinstance(verdict, Grant)
        return verdict, snapshot

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self._call(name, *args, **kwargs)

    async def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._is_closed:
            raise asyncio.CancelledError
        store = self._store
        method = getattr(store.ledger if hasattr(store.ledger, name) else store.tasks, name)
        call = PendingCall(name, lambda: method(*args, **kwargs), asyncio.get_running_loop().create_future())
        store.pending.append(call)
        self._open_calls.append(call)
        try:
            if name not in _QUEUED_CALLS:
                await store.resolve(call, store.next_outcomes.pop() if store.next_outcomes else CallOutcome.DONE)
            return await call.result
        except asyncio.CancelledError:  # the caller was cancelled, but the call is still on its way
            if call in store.pending:
                store.pending.remove(call)
                store.delayed += [call] if self._runs_pending else []
            raise
        finally:
            self._open_calls.remove(call)


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
        if caller.process.is_dead:
            raise asyncio.CancelledError
        request = UpstreamRequest(account, asyncio.get_running_loop().create_future())
        await self._check_send(caller, request, timeout_seconds)
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
            is_stopping = caller.process.is_stopping
            self._store.ledger.check_rule(is_stopping, "sending was broken off though the process goes on")
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

    async def _check_send(self, caller: Caller, request: UpstreamRequest, seconds: float) -> None:
        """Check that the account is reserved until after the timeout and that nothing was charged before."""
        store, check_rule = self._store, self._store.ledger.check_rule
        name = caller.reservation_ids[-1]
        reservation = await store.execute(lambda: store.ledger.get_reservation(name))
        check_rule(request.account not in [item.account for item in caller.requests], "an account was asked twice")
        check_rule(
            {item.outcome for item in caller.requests} <= FAILOVER_OUTCOMES,
            "sent again although it may have been charged",
        )
        if seconds > 0:
            place = (reservation.state, reservation.account) if reservation else None
            check_rule(place == (ReservationState.RESERVED, request.account.id), f"sent with a place on {place}")
            latest = store.loop.now_ms + (seconds + LEASE_MARGIN_SECONDS) * 1000
            is_in_time = reservation is None or latest <= reservation.lease_expires_at + 1
            check_rule(is_in_time, "sending may outlast its lease")

    def _check_key(self, caller: Caller, request: UpstreamRequest) -> None:
        """Check that nothing is sent under a key after a possible charge while the key is kept."""
        if caller.key is None:
            return
        now, sent = self._store.loop.now_ms, self._sent_by_key.setdefault((caller.tenant.id, caller.key), [])
        kept_ms = KEEP_IDEMPOTENCY_KEY_MS - self._store.retention.lease_ms
        charged = [item for at, item in sent if item.outcome not in _FREE_OUTCOMES and now < at + kept_ms]
        self._store.ledger.check_rule(not charged, "a key was sent again although it may have been charged")
        sent.append((now, request))

    async def check(self, account: Account, upstream_id: str) -> CheckResult:
        del account
        return self.check_results.get(upstream_id, CheckResult(outcome=CheckOutcome.RUNNING))


class GatewayProcess:
    def __init__(self, store: FaultyStore, upstream: FaultyUpstream) -> None:
        self.is_dead = False
        self.is_stopping = False
        self.open_requests: list[UpstreamRequest] = []
        self.background = TaskSupervisor()
        self._connection = StoreConnection(store)
        connection: Any = self._connection
        shared: dict[str, Any] = {
            "ledger": connection,
            "tasks": connection,
            "upstream": upstream,
            "registry": store.registry,
            "task_ids": TaskIdCodec(Keyring([b"k" * 32]).derive("task-id")),
            "metrics": _METRICS,
        }
        settlements = SettlementQueue(connection, self.background, store.registry)
        self._submitter = Submitter(settlements=settlements, supervisor=self.background, **shared)
        self._reader = TaskReader(
            fetch_artifact=connection.fetch_artifact,
            cache=TaskCache(DurationEstimator(0)),
            now=lambda: store.loop.now_ms / 1000,
            interval_seconds=0,
            **shared,
        )
        poller = TaskPoller(cache=TaskCache(DurationEstimator(0)), **shared)
        loop = asyncio.get_running_loop()
        self._poll_loops = [loop.create_task(poller.run()), loop.create_task(poller.expire_leases())]

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
