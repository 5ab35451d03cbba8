"""A ledger whose calls fail in every possible way.

Calls that change reservations stay pending until their outcome is chosen; calls of the poller and of readers run at
once. Rules that can be violated only during a call are checked during it.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from service.domain import ledger
from service.domain.errors import LedgerUnavailable
from service.domain.ledger import (
    AccountState,
    AccountStatus,
    Balance,
    DayUsage,
    Grant,
    RefundResult,
    Reservation,
    ReservationState,
    TenantState,
    Verdict,
)
from service.domain.tasks import Backlog, Kind, State, Task
from service.domain.tenants import Window
from service.usecases.ports import (
    BalanceCheck,
    CheckResult,
    ClaimedCheck,
    ReserveRequest,
    Settlement,
    TaskPage,
    TenantSnapshot,
)
from tests.fakes import FakeLedger
from tests.model import ledger_model

T = TypeVar("T")

CHARGED = (ReservationState.ACCEPTED, ReservationState.UNKNOWN)
COUNTED = (ReservationState.RESERVED, *CHARGED)
_PROVISIONAL = {None, ReservationState.RESERVED, ReservationState.UNKNOWN}


class CallOutcome(StrEnum):
    DONE = "done"
    REPEATED = "twice"
    LOST = "lost"
    """It never runs, and the caller gets an error."""
    UNANSWERED = "unanswered"
    """It runs, but the caller gets an error."""
    LATE = "late"
    """The caller gets an error, and it may run some time later."""


@dataclass
class FaultyStore(FakeLedger):
    """The model ledger; `violations` are broken rules, found without its own counters."""

    violations: list[str] = field(default_factory=list)
    unknown_reservations: set[str] = field(default_factory=set)

    async def reserve(self, request: ReserveRequest) -> tuple[Verdict, TenantSnapshot]:
        is_known, before = request.reservation in self.reservations, self._snapshot(request.tenant)
        verdict, snapshot = await super().reserve(request)
        if not isinstance(verdict, Grant):
            self.check_rule(self._snapshot(request.tenant) == before, "a refusal changed the counters")
        elif not is_known:
            self.check_rule(self._is_within_limits(request), "a place was granted past a limit")
        return verdict, snapshot

    async def settle(self, settlement: Settlement) -> bool:
        before = self.state_of(settlement.reservation)
        booked = await super().settle(settlement)
        after = self.state_of(settlement.reservation)
        if after is ReservationState.UNKNOWN:
            self.unknown_reservations.add(settlement.reservation)
        self.check_rule(before in _PROVISIONAL or before is after, f"an outcome was final, but {before} became {after}")
        return booked

    def check_rule(self, holds: bool, violation: str) -> None:
        """Record a violation; raised here, it would be handled like an error of the store."""
        if not holds:
            self.violations.append(violation)

    def state_of(self, reservation: str) -> ReservationState | None:
        stored = self.reservations.get(reservation)
        return stored.state if stored else None

    def count_states(self, tenant: int, window: Window) -> Counter[ReservationState]:
        """Count the tenant's reservations of this window by state."""
        now = ledger.window_bounds(window, self.clock.now_ms)
        return Counter(
            reservation.state
            for reservation in self.reservations.values()
            if reservation.tenant == tenant and ledger.window_bounds(window, reservation.created_at) == now
        )

    def count_active(self, tenant: int) -> int:
        """Count the tenant's submissions that are reserved or have a running task."""
        return sum(
            reservation.tenant == tenant
            and reservation.state in {ReservationState.RESERVED, ReservationState.ACCEPTED}
            and reservation.cost is None
            for reservation in self.reservations.values()
        )

    def tenant_counters(self, tenant: int) -> TenantState:
        state = copy.deepcopy(self._tenant_state(tenant))
        ledger_model.roll_windows(state, self.clock.now_ms)
        return state

    def _is_within_limits(self, ask: ReserveRequest) -> bool:
        policy, holds = self._tenant_policy(ask.tenant), self.reservations[ask.reservation].money_holds
        for limit in policy.limits:
            outcomes, counter = (
                self.count_states(ask.tenant, limit.window),
                self.tenant_counters(ask.tenant).windows[limit.window],
            )
            if limit.tasks is not None and sum(outcomes[item] for item in COUNTED) > limit.tasks:
                return False
            money_fen = counter.money_fen + counter.money_reserved_fen
            if limit.money_fen is not None and holds.get(limit.window) and money_fen > limit.money_fen:
                return False
        return policy.max_active is None or self.count_active(ask.tenant) <= policy.max_active

    def _snapshot(self, tenant: int) -> tuple[TenantState, dict[int, AccountState], int]:
        accounts = {
            account_policy: copy.deepcopy(self._account_state(account_policy))
            for account_policy in self.account_policies
        }
        return self.tenant_counters(tenant), accounts, len(self.reservations)


@dataclass(eq=False)
class PendingCall:
    execute: Callable[[], Coroutine[Any, Any, Any]]
    result: asyncio.Future[Any]


class CallQueue:
    """Pending and delayed calls of all processes.

    `next_outcomes` are those of the next calls that run at once.
    """

    def __init__(self) -> None:
        self.pending: list[PendingCall] = []
        self.delayed: list[PendingCall] = []
        self.next_outcomes: list[CallOutcome] = []

    async def resolve(self, call: PendingCall, outcome: CallOutcome) -> None:
        self.pending.remove(call)
        try:
            if outcome in {CallOutcome.LOST, CallOutcome.LATE}:
                raise LedgerUnavailable("no connection", retry_after=1)
            result = await call.execute()
            if outcome is CallOutcome.REPEATED:
                result = await call.execute()
            if outcome is CallOutcome.UNANSWERED:
                raise LedgerUnavailable("no answer", retry_after=1)
        except LedgerUnavailable as error:
            call.result.set_exception(error)
        else:
            call.result.set_result(result)
        if outcome is CallOutcome.LATE:
            self.delayed.append(call)

    async def execute_delayed(self, call: PendingCall) -> None:
        self.delayed.remove(call)
        try:
            await call.execute()
        except LedgerUnavailable:
            return


class StoreConnection:
    """Ledger and TaskStore as used by one process."""

    def __init__(self, store: FaultyStore, post: CallQueue) -> None:
        self._store = store
        self._queue = post
        self._open_calls: list[PendingCall] = []
        self._is_closed = False
        self._runs_pending = True

    def close(self, *, runs_pending: bool) -> None:
        """End the process: no new calls; pending ones are lost unless `runs_pending`."""
        self._is_closed, self._runs_pending = True, runs_pending
        for call in self._open_calls:
            call.result.cancel()

    async def reserve(self, ask: ReserveRequest) -> tuple[Verdict, TenantSnapshot]:
        return await self._call(lambda: self._store.reserve(ask))

    async def change_account(self, ask: ReserveRequest, previous: int, closes: AccountStatus | None) -> Verdict:
        return await self._call(lambda: self._store.change_account(ask, previous, closes))

    async def settle(self, settlement: Settlement) -> bool:
        return await self._call(lambda: self._store.settle(settlement))

    async def settle_expired(self, most: int) -> Sequence[Settlement]:
        return await self._call_immediately(lambda: self._store.settle_expired(most))

    async def claim_checks(self, most: int) -> Sequence[ClaimedCheck]:
        return await self._call_immediately(lambda: self._store.claim_checks(most))

    async def record_check(self, due: ClaimedCheck, check: CheckResult) -> tuple[Task, int] | None:
        return await self._call_immediately(lambda: self._store.record_check(due, check))

    async def get(self, reservation: str) -> tuple[Task, int] | None:
        return await self._call_immediately(lambda: self._store.get(reservation))

    async def touch(self, reservations: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        return await self._call_immediately(lambda: self._store.touch(reservations))

    async def list_page(
        self, tenant: int, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> TaskPage:
        return await self._store.list_page(tenant, state=state, kind=kind, limit=limit, cursor=cursor)

    async def tenant_snapshot(self, tenant: int) -> TenantSnapshot:
        return await self._store.tenant_snapshot(tenant)

    async def tenant_states(self, ids: Sequence[int]) -> tuple[Mapping[int, TenantState], int]:
        return await self._store.tenant_states(ids)

    async def backlog(self) -> Backlog:
        return await self._store.backlog()

    async def account_states(self, ids: Sequence[int]) -> Mapping[int, AccountState]:
        return await self._store.account_states(ids)

    async def reopen_account(self, account: int) -> None:
        await self._store.reopen_account(account)

    async def clock_offset(self) -> int:
        return await self._store.clock_offset()

    async def reset_clock(self, tenants: Sequence[int], accounts: Sequence[int]) -> int:
        return await self._store.reset_clock(tenants, accounts)

    async def get_reservation(self, reservation: str) -> Reservation | None:
        return await self._store.get_reservation(reservation)

    async def refund(self, tenant: int, reservation: str, reason: str) -> tuple[RefundResult, Reservation] | None:
        return await self._store.refund(tenant, reservation, reason)

    async def get_usage(self, tenant: int, days: Sequence[int]) -> Sequence[DayUsage]:
        return await self._store.get_usage(tenant, days)

    async def current_day(self) -> int:
        return await self._store.current_day()

    async def claim_balance_check(self, account: int, *, count_only: bool) -> BalanceCheck | None:
        return await self._store.claim_balance_check(account, count_only=count_only)

    async def record_balance_check(self, check: BalanceCheck, balance: Balance) -> None:
        await self._store.record_balance_check(check, balance)

    async def _call(self, work: Callable[[], Coroutine[Any, Any, T]], outcome: CallOutcome | None = None) -> T:
        if self._is_closed:
            raise asyncio.CancelledError
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        call = PendingCall(work, result)
        self._queue.pending.append(call)
        if outcome:
            await self._queue.resolve(call, outcome)
        self._open_calls.append(call)
        try:
            return await result
        except asyncio.CancelledError:  # the caller was cancelled, but the call is still on its way
            if call in self._queue.pending:
                self._queue.pending.remove(call)
                self._queue.delayed += [call] if self._runs_pending else []
            raise
        finally:
            self._open_calls.remove(call)

    async def _call_immediately(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return await self._call(
            work, self._queue.next_outcomes.pop() if self._queue.next_outcomes else CallOutcome.DONE
        )
