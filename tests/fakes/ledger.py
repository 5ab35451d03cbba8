"""Test double of the ledger over the ledger model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import (
    AccountState,
    AccountStatus,
    Balance,
    DayUsage,
    Grant,
    Idempotency,
    InFlight,
    KeyReuse,
    LedgerClock,
    RefundResult,
    Replay,
    Reservation,
    ReservationState,
    TenantState,
    Verdict,
)
from service.domain.tasks import Cost, CostBasis, State, Task
from service.storage.ledger import KEEP_IDEMPOTENCY_KEY_MS
from service.storage.redis import DAY_MS
from service.usecases.ports import BalanceCheck, ReserveRequest, Settlement, TenantSnapshot
from tests.fakes.tasks import FakeTaskStore
from tests.model import ledger_model
from tests.model.ledger_model import to_server_time


@dataclass
class FakeLedger(FakeTaskStore):
    """Ledger and TaskStore in memory; the Redis implementation is compared with it."""

    async def reserve(self, request: ReserveRequest) -> tuple[Verdict, TenantSnapshot]:
        self._raise_if_unavailable()
        at, tenant = self.clock.read_times(), copy.deepcopy(self._tenant_state(request.tenant))
        now = at.server_ms
        if request.tenant not in self.tenant_policies:
            raise LedgerUnavailable("gone", retry_after=2)
        ledger_model.roll_windows(tenant, now)
        reservation = self.reservations.get(request.reservation)
        if reservation:
            return self._regrant(reservation), TenantSnapshot(copy.deepcopy(tenant), now)
        replay = self._find_replay(request)
        if replay:
            return replay, TenantSnapshot(copy.deepcopy(tenant), now)
        lease = at.ledger_ms + self.retention.lease_ms
        made = Reservation(
            ReservationState.RESERVED,
            request.tenant,
            0,
            request.kind,
            created_at=now,
            dispatched_at=at.ledger_ms,
            lease_expires_at=lease,
        )
        made.key_digest = request.idempotency.key_digest if request.idempotency else None
        verdict = ledger_model.reserve_place(
            tenant, self._tenant_policy(request.tenant), self._candidates(request.accounts), made, at
        )
        if isinstance(verdict, Grant):
            self.tenants[request.tenant] = tenant
            self.reservations[request.reservation] = made
            self._store_key(request.tenant, request.reservation, request.idempotency)
        return verdict, TenantSnapshot(copy.deepcopy(tenant), now)

    def _find_replay(self, ask: ReserveRequest) -> Verdict | None:
        if ask.idempotency is None:
            return None
        name, content, until = self.idempotency_keys.get((ask.tenant, ask.idempotency.key_digest), ("", "", 0))
        reservation = self.reservations.get(name)
        if reservation is None or until <= self.clock.now_ms:
            return None
        if content != ask.idempotency.content_digest:
            return KeyReuse(self.clock.now_ms)
        if reservation.state is ReservationState.RESERVED:
            return InFlight(self.clock.now_ms)
        return Replay(name, reservation.state, self.clock.now_ms)

    def _store_key(self, tenant: int, name: str, idempotency: Idempotency | None) -> None:
        if idempotency:
            self.idempotency_keys[tenant, idempotency.key_digest] = (
                name,
                idempotency.content_digest,
                self.clock.now_ms + KEEP_IDEMPOTENCY_KEY_MS,
            )

    async def change_account(
        self, request: ReserveRequest, previous: int, account_status: AccountStatus | None
    ) -> Verdict:
        self._raise_if_unavailable()
        reservation = self.reservations.get(request.reservation)
        if reservation is None or reservation.state is not ReservationState.RESERVED:
            raise LedgerUnavailable("given up")
        if reservation.account != previous:
            return self._regrant(reservation)
        tenant = copy.deepcopy(self._tenant_state(request.tenant))
        verdict = ledger_model.change_account(
            tenant,
            self._tenant_policy(request.tenant),
            self._candidate(previous),
            account_status,
            self._candidates(request.accounts),
            reservation,
            self.clock.read_times(),
        )
        if isinstance(verdict, Grant):
            self.tenants[request.tenant] = tenant
        return verdict

    async def settle(self, settlement: Settlement) -> bool:
        self._raise_if_unavailable()
        at, name = self.clock.read_times(), settlement.reservation
        tenant = copy.deepcopy(self._tenant_state(settlement.tenant))
        reservation = self.reservations.get(name)
        if reservation is None:
            reservation = self.reservations[name] = Reservation(
                settlement.outcome,
                settlement.tenant,
                settlement.account,
                settlement.kind,
                created_at=settlement.created_at,
                dispatched_at=min(settlement.created_at, at.ledger_ms),
                lease_expires_at=settlement.created_at,
            )
            if settlement.outcome in {ReservationState.REFUSED, ReservationState.NOT_SENT}:
                return True
            self._restore_key(settlement, reservation)
            ledger_model.recreate_reservation(
                tenant, self._account_state(settlement.account), name, reservation, self._usage_day(reservation), at
            )
            if settlement.outcome is ReservationState.UNKNOWN:
                self.tenants[settlement.tenant] = tenant
                return True
        if (
            settlement.is_late
            and reservation.state is ReservationState.RESERVED
            and reservation.lease_expires_at > at.ledger_ms
        ):
            return False
        account = self._candidate(reservation.account)
        figures, closes, day = settlement.balance, settlement.account_status, self._usage_day(reservation)
        if (
            settlement.account != reservation.account
        ):  # the account was changed: the balance belongs to the previous one
            figures, closes = Balance(), None
        if not ledger_model.settle_reservation(
            tenant, account, name, reservation, settlement.outcome, figures, closes, day, at
        ):
            return False
        self.tenants[settlement.tenant] = tenant
        self._store_inference(account)
        if settlement.outcome in {ReservationState.REFUSED, ReservationState.NOT_SENT}:
            self._free_key(name, reservation)
        if settlement.outcome is ReservationState.ACCEPTED and settlement.new_task:
            self._create_task(settlement, reservation)
        return True

    def _restore_key(self, settlement: Settlement, reservation: Reservation) -> None:
        idempotency = settlement.idempotency
        if idempotency is None:
            return
        reservation.key_digest = idempotency.key_digest
        _, _, until = self.idempotency_keys.get((reservation.tenant, idempotency.key_digest), ("", "", 0))
        if until <= self.clock.now_ms:
            self._store_key(reservation.tenant, settlement.reservation, idempotency)

    def _free_key(self, name: str, reservation: Reservation) -> None:
        if (
            reservation.key_digest
            and self.idempotency_keys.get((reservation.tenant, reservation.key_digest), ("",))[0] == name
        ):
            del self.idempotency_keys[reservation.tenant, reservation.key_digest]

    def _create_task(self, settlement: Settlement, reservation: Reservation) -> None:
        if settlement.new_task is None:
            return
        self.tasks[settlement.reservation] = Task(
            id=settlement.new_task.id,
            reservation=settlement.reservation,
            tenant=reservation.tenant,
            account=reservation.account,
            kind=reservation.kind,
            state=State.QUEUED,
            created_at=reservation.created_at,
            updated_at=reservation.created_at,
            finished_at=None,
            options=settlement.new_task.options,
            metadata=settlement.new_task.metadata,
            artifacts=(),
            error=None,
            cost=Cost(0, 0, CostBasis.UNKNOWN),
            version=1,
            last_checked_at=reservation.created_at,
            webhook_url=settlement.new_task.webhook_url,
            trace_context=settlement.new_task.trace_context,
        )
        self.due_checks[settlement.reservation] = self.clock.read_times().ledger_ms + self.retention.check_interval_ms

    async def settle_expired(self, limit: int) -> Sequence[Settlement]:
        self._raise_if_unavailable()
        now = self.clock.read_times().ledger_ms
        lapsed = [
            (reservation.lease_expires_at, name, reservation)
            for name, reservation in self.reservations.items()
            if reservation.state is ReservationState.RESERVED and reservation.lease_expires_at <= now
        ]
        settled = [
            Settlement(
                reservation=name,
                tenant=item.tenant,
                account=item.account,
                kind=item.kind,
                created_at=item.created_at,
                outcome=ReservationState.UNKNOWN,
            )
            for _, name, item in sorted(lapsed)[:limit]
        ]
        for settlement in settled:
            await self.settle(settlement)
        return settled

    async def tenant_snapshot(self, tenant: int) -> TenantSnapshot:
        self._raise_if_unavailable()
        return TenantSnapshot(copy.deepcopy(self._tenant_state(tenant)), self.clock.now_ms)

    async def tenant_states(self, ids: Sequence[int]) -> tuple[Mapping[int, TenantState], int]:
        self._raise_if_unavailable()
        return {item: copy.deepcopy(self._tenant_state(item)) for item in ids}, self.clock.now_ms

    async def account_states(self, ids: Sequence[int]) -> Mapping[int, AccountState]:
        self._raise_if_unavailable()
        offset = self.clock.read_times().offset_ms
        return {item: self._account_state(item).to_server_time(offset) for item in ids}

    async def reopen_account(self, account: int) -> None:
        self._raise_if_unavailable()
        state = self._account_state(account)
        state.status, state.next_probe_at, state.count, state.money = AccountStatus.OPEN, 0, None, None
        state.closed_at, state.reopened_at = 0, self.clock.read_times().ledger_ms

    async def clock_offset(self) -> int:
        self._raise_if_unavailable()
        return self.clock.read_times().offset_ms

    async def reset_clock(self, tenants: Sequence[int], accounts: Sequence[int]) -> int:
        self._raise_if_unavailable()
        offset = self.clock.read_times().offset_ms
        for name, reservation in self.reservations.items():
            reserved, runs = (
                reservation.state is ReservationState.RESERVED,
                name in self.due_checks or name in self.claimed_checks,
            )
            unknown = reservation.state is ReservationState.UNKNOWN and reservation.tenant in tenants
            if reserved or unknown or (runs and reservation.state is ReservationState.ACCEPTED):
                self.reservations[name] = reservation.to_server_time(offset)
        for account in set(accounts) & self.states_by_account.keys():
            self.states_by_account[account] = self.states_by_account[account].to_server_time(offset)
        self.failure_stopwatches = {
            name: (one.shift(offset), other.shift(offset)) for name, (one, other) in self.failure_stopwatches.items()
        }
        for name in self.failing_until.keys() & self.receiver_turns.keys():
            self.failing_until[name] -= offset
        for times in (
            self.due_checks,
            self.claimed_checks,
            self.receiver_turns,
            self.queued_deliveries,
            self.leased_deliveries,
        ):
            for name in times:
                times[name] -= offset
        self.clock.ledger_clock = LedgerClock(self.clock.now_ms)
        return offset

    async def claim_balance_check(self, account: int, *, count_only: bool) -> BalanceCheck | None:
        self._raise_if_unavailable()
        candidate, now = self._candidate(account), self.clock.read_times().ledger_ms
        state, policy = candidate.state, candidate.policy
        if account not in self.account_policies or not ledger_model.is_balance_check_due(
            state, policy, now, count_only=count_only
        ):
            return None
        ledger_model.start_balance_check(state, now)
        return BalanceCheck(account, state.last_finished_task.reservation, now) if state.last_finished_task else None

    async def record_balance_check(self, check: BalanceCheck, balance: Balance) -> None:
        self._raise_if_unavailable()
        candidate, now = self._candidate(check.account), self.clock.read_times().ledger_ms
        claimed = min(check.claimed_at, now)
        ledger_model.record_balance_check(candidate.state, candidate.policy, check.reservation, balance, claimed, now)
        self._store_inference(candidate)

    async def get_reservation(self, reservation: str) -> Reservation | None:
        self._raise_if_unavailable()
        stored, at = self.reservations.get(reservation), self.clock.read_times()
        return copy.deepcopy(stored).to_server_time(at.offset_ms) if stored else None

    async def refund(self, tenant: int, reservation: str, reason: str) -> tuple[RefundResult, Reservation] | None:
        self._raise_if_unavailable()
        stored = self.reservations.get(reservation)
        if stored is None or stored.tenant != tenant:
            return None
        at, state = self.clock.read_times(), copy.deepcopy(self._tenant_state(tenant))
        did = ledger_model.refund_reservation(state, reservation, stored, reason, self._usage_day(stored), at)
        if did is RefundResult.REFUNDED:
            self.tenants[tenant] = state
        return did, copy.deepcopy(stored).to_server_time(at.offset_ms)

    async def get_usage(self, tenant: int, days: Sequence[int]) -> Sequence[DayUsage]:
        self._raise_if_unavailable()
        return [copy.deepcopy(self.usage_days.get((tenant, day), DayUsage())) for day in days]

    async def current_day(self) -> int:
        self._raise_if_unavailable()
        return self.clock.now_ms // DAY_MS

    def _regrant(self, reservation: Reservation) -> Grant:
        if reservation.state in {ReservationState.REFUSED, ReservationState.NOT_SENT}:
            raise LedgerUnavailable("given up")
        at = self.clock.read_times()
        return Grant(reservation.account, at.server_ms, to_server_time(at, reservation.lease_expires_at))
