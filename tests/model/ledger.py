"""The rules of the ledger in Python: the oracle of the property tests of the Lua scripts.

The calls of the ledger, without I/O. All counters of windows and days are sums over the reservations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from service.domain.availability import PROBE_INTERVAL_MS, choose_account
from service.domain.errors import LedgerUnavailable, Violation
from service.domain.ledger import (
    MAX_ACTIVE_POLICY,
    UNIT_MONEY,
    UNIT_TASKS,
    AccountState,
    AccountStatus,
    Balance,
    BalanceSnapshot,
    Candidate,
    ClockReading,
    DayUsage,
    Grant,
    Idempotency,
    InFlight,
    KeyReuse,
    LedgerClock,
    Measure,
    NoAccount,
    PolicyDenial,
    ReadingSource,
    Refund,
    RefundResult,
    Replay,
    Reservation,
    ReservationState,
    Tally,
    TenantState,
    Verdict,
    WindowCounter,
    all_counters,
    current_counter,
    policy_name,
    sum_charged_fen,
    sum_charged_uses,
    window_bounds,
)
from service.domain.tasks import Cost, CostBasis, Kind, State, Task
from service.domain.tenants import AccountPolicy, Limit, SpendingMode, TenantPolicy, Window
from service.storage.ledger import KEEP_IDEMPOTENCY_KEY_MS, Retention
from service.storage.redis import DAY_MS, LATE_CHARGE_MS
from service.usecases.ports import BalanceCheck, CheckResult, ReserveRequest, Settlement, TenantSnapshot
from tests.model import accounts

ACCEPTED, UNKNOWN = ReservationState.ACCEPTED, ReservationState.UNKNOWN
FREE_STATES = (ReservationState.REFUSED, ReservationState.NOT_SENT)
_COST_MEASURES = {
    CostBasis.OBSERVED: (Measure.OBSERVED_COUNT, Measure.OBSERVED_MONEY),
    CostBasis.ESTIMATED: (Measure.ESTIMATED_COUNT, Measure.ESTIMATED_MONEY),
}


def is_reserved(reservation: Reservation) -> bool:
    return reservation.state is ReservationState.RESERVED


def is_open(reservation: Reservation) -> bool:
    """Return whether it counts as an active task."""
    return is_reserved(reservation) or (reservation.state is ACCEPTED and reservation.cost is None)


def is_charged(reservation: Reservation) -> bool:
    """Return whether its windows count it as used."""
    return reservation.state in {ACCEPTED, UNKNOWN} and not reservation.refund


def usage_of(reservation: Reservation) -> Tally:
    """Return what a reservation counts for in the usage of its day."""
    tally, cost, refund = Tally(), reservation.cost, reservation.refund
    if reservation.state is UNKNOWN:
        tally[Measure.UNKNOWN] = 1
        tally[Measure.UNKNOWN_MONEY] = reservation.money_holds.get(Window.DAY, 0)
    elif reservation.state in FREE_STATES:
        tally[Measure(reservation.state.value)] = 1
    elif cost:
        tally[Measure.SUCCEEDED if reservation.succeeded else Measure.FAILED] = 1
        if cost.basis in _COST_MEASURES:
            count, money = _COST_MEASURES[cost.basis]
            tally[count], tally[money] = cost.count, cost.money_fen
        else:
            tally[Measure.UNKNOWN_COST] = 1
    elif reservation.state is ACCEPTED:
        tally[Measure.RUNNING] = 1
    tally[Measure.OVERRUN_MONEY] = reservation.overrun_fen
    if refund:
        tally[Measure.REFUNDED] = 1
        tally[Measure.REFUNDED_COUNT], tally[Measure.REFUNDED_MONEY] = refund.count, refund.money_fen
    return tally


def roll_windows(state: TenantState, now: int) -> None:
    """Start the windows whose bounds no longer contain `now`.

    The server clock may step back into an earlier window, so the previous counter is retained, and later ones after a
    step. An earlier window whose counter is gone gets a replacement key: it may have been counted before.
    """
    for window in Window:
        start, _ = window_bounds(window, now)
        if window in state.windows and state.windows[window].window_start == start:
            continue
        counters = all_counters(state, window)
        later = [counter for counter in counters if counter.window_start > start]
        previous = max(
            (counter for counter in counters if counter.window_start < start),
            key=lambda counter: counter.window_start,
            default=None,
        )
        current = current_counter(state, window, now)
        if later and current not in counters:
            state.replacement_key_seq += 1
            current.replacement_key = -state.replacement_key_seq
        retained = [*later, previous] if previous else later
        state.windows[window] = current
        state.retained_counters = state.retained_counters | {window: retained}
        if not retained:
            del state.retained_counters[window]


def counter_key(counter: WindowCounter) -> int:
    """Return the key by which reservations refer to a counter."""
    return counter.window_start if counter.replacement_key is None else counter.replacement_key


def count_reservations(state: TenantState, reservations: Iterable[Reservation]) -> None:
    """Set all counters of a tenant to what its reservations count for, except the overrun."""
    counters = {(window, counter_key(item)): item for window in Window for item in all_counters(state, window)}
    for counter in counters.values():
        counter.tasks = counter.tasks_reserved = counter.money_fen = counter.money_reserved_fen = 0
    state.active_by_kind = dict.fromkeys(state.active_by_kind, 0)
    for reservation in reservations:
        if is_open(reservation):
            state.active_by_kind[reservation.kind] = state.active_by_kind.get(reservation.kind, 0) + 1
        for window, key in reservation.window_starts.items():
            if mine := counters.get((window, key)):
                mine.tasks_reserved += is_reserved(reservation)
                mine.tasks += is_charged(reservation)
                cost, held_fen = reservation.cost, reservation.money_holds.get(window, 0)
                money = cost.money_fen if cost else held_fen
                mine.money_reserved_fen += is_open(reservation) * money
                mine.money_fen += (is_charged(reservation) and not is_open(reservation)) * money
    state.active_tasks = sum(state.active_by_kind.values())


@dataclass
class LedgerModel:
    """What Redis stores, and the calls of the ledger."""

    now_ms: int
    retention: Retention
    clock: LedgerClock = field(default_factory=LedgerClock)
    tenant_policies: dict[int, TenantPolicy] = field(default_factory=dict)
    account_policies: dict[int, AccountPolicy] = field(default_factory=dict)
    tenants: dict[int, TenantState] = field(default_factory=dict)
    accounts: dict[int, AccountState] = field(default_factory=dict)
    reservations: dict[str, Reservation] = field(default_factory=dict)
    idempotency_keys: dict[tuple[int, str], tuple[str, str, int]] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    due_checks: dict[str, int] = field(default_factory=dict)

    def read_clock(self) -> ClockReading:
        self.clock = self.clock.advance(self.now_ms)
        return ClockReading(self.clock.last_ms, self.now_ms)

    def tenant_state(self, tenant: int) -> TenantState:
        """Return a tenant's counters now; nothing is stored."""
        state = copy.deepcopy(self.tenants.get(tenant, TenantState()))
        roll_windows(state, self.now_ms)
        count_reservations(state, (item for item in self.reservations.values() if item.tenant == tenant))
        return state

    def usage(self, tenant: int, day: int) -> DayUsage:
        usage = DayUsage()
        for name, item in self.reservations.items():
            if item.tenant == tenant and item.created_at // DAY_MS == day and item.window_starts:
                usage.tallies.setdefault(item.kind, Tally()).update(usage_of(item))
                if item.state is UNKNOWN:
                    usage.unknown[name] = item.kind
                if item.refund:
                    usage.refunds[name] = item.kind, item.refund
        return usage

    def spent(self, tenant: int, window: Window) -> dict[Kind, tuple[int, int]]:
        """Return the uses and the fen that the current window's usage charges, by kind."""
        start, end = window_bounds(window, self.now_ms)
        tallies: dict[Kind, Tally] = {}
        for item in self.reservations.values():
            if item.tenant == tenant and item.window_starts and start <= item.created_at < (end or math.inf):
                tallies.setdefault(item.kind, Tally()).update(usage_of(item))
        return {kind: (sum_charged_uses(tally), sum_charged_fen(tally)) for kind, tally in tallies.items()}

    def reserve(self, request: ReserveRequest) -> tuple[Verdict, TenantSnapshot]:
        at, tenant = self.read_clock(), self.tenant_state(request.tenant)
        if request.tenant not in self.tenant_policies:
            raise LedgerUnavailable("gone")
        snapshot = TenantSnapshot(tenant, at.server_ms)
        if stored := self.reservations.get(request.reservation):
            return self._grant_again(stored), snapshot
        if replay := self._find_replay(request):
            return replay, snapshot
        reservation = Reservation(
            ReservationState.RESERVED,
            request.tenant,
            0,
            request.kind,
            created_at=at.server_ms,
            dispatched_at=at.ledger_ms,
            lease_expires_at=at.ledger_ms + self.retention.lease_ms,
            key_digest=request.idempotency.key_digest if request.idempotency else None,
        )
        policy = self.tenant_policies[request.tenant]
        verdict, holds = self._choose(tenant, policy, request.accounts, request.kind, at, checks_tasks=True)
        if not isinstance(verdict, Candidate):
            return verdict, snapshot
        reservation.window_starts = {window: counter_key(tenant.windows[window]) for window in Window}
        self._assign_account(verdict, reservation, holds, policy.spending_mode, at.ledger_ms)
        self.reservations[request.reservation] = reservation
        self._store_tenant(request.tenant)
        self._store_key(request.tenant, request, overwrites=True)
        return self._grant_again(reservation), TenantSnapshot(self.tenant_state(request.tenant), at.server_ms)

    def change_account(self, request: ReserveRequest, previous: int, account_status: AccountStatus | None) -> Verdict:
        at, reservation = self.read_clock(), self.reservations.get(request.reservation)
        if reservation is None or not is_reserved(reservation):
            raise LedgerUnavailable("given up")
        if reservation.account != previous:
            return self._grant_again(reservation)
        candidate = self._candidate(previous)
        if account_status:
            accounts.close_on_refusal(candidate.state, account_status, reservation.dispatched_at, at.ledger_ms)
        policy, tenant = self._tenant_policy(request.tenant), self.tenant_state(request.tenant)
        others = [
            item for item in self.reservations.values() if item.tenant == request.tenant and item is not reservation
        ]
        count_reservations(tenant, others)
        verdict, holds = self._choose(tenant, policy, request.accounts, reservation.kind, at, checks_tasks=False)
        if not isinstance(verdict, Candidate):
            return verdict
        candidate.state.open_submissions -= 1
        candidate.state.unsettled -= 1
        accounts.cancel_expected_charge(candidate.state, candidate.policy, reservation, still_expected=True)
        self._assign_account(verdict, reservation, holds, policy.spending_mode, at.ledger_ms)
        self._store_tenant(request.tenant)
        return self._grant_again(reservation)

    def settle(self, settlement: Settlement) -> bool:
        at, name, outcome = self.read_clock(), settlement.reservation, settlement.outcome
        reservation = self.reservations.get(name)
        if reservation is None:
            reservation = self._recreate(settlement, at)
            if outcome is not ACCEPTED:
                return True
        is_pending = is_reserved(reservation) and reservation.lease_expires_at > at.ledger_ms
        if settlement.is_late and is_pending:
            return False
        previous, candidate, still_expected = reservation.state, self._candidate(reservation.account), True
        if previous not in {ReservationState.RESERVED, UNKNOWN} or previous is outcome:
            return False
        state, balance, account_status = candidate.state, settlement.balance, settlement.account_status
        if settlement.account != reservation.account:  # the account was changed: these are of the previous one
            balance, account_status = Balance(), None
        if previous is UNKNOWN:
            state.unknown_outcomes -= 1
            still_expected = accounts.resolve_untracked(state, reservation)
            if state.pending_inference and state.pending_inference.reservation == name:
                state.pending_inference = None
        else:
            state.unsettled -= 1
            state.open_submissions -= 1
        reservation.state, reservation.settled_at = outcome, at.ledger_ms
        if outcome is ACCEPTED:
            self._accept(settlement, reservation, candidate, balance, at, was_unknown=previous is UNKNOWN)
        elif outcome is UNKNOWN:
            state.unknown_outcomes += 1
            accounts.start_inference(state, name, reservation, at.ledger_ms)
        else:
            self._release(name, reservation, candidate, account_status, at, still_expected=still_expected)
        dispatched_at, kind = reservation.dispatched_at, reservation.kind
        accounts.observe_balance(
            state, candidate.policy, balance, ReadingSource.SUBMIT, dispatched_at, at.ledger_ms, kind
        )
        if outcome is ACCEPTED:
            accounts.learn_charge_timing(state, reservation, balance)
        self._store_inference(candidate)
        self._store_tenant(settlement.tenant)
        return True

    def settle_expired(self, limit: int) -> Sequence[Settlement]:
        now = self.read_clock().ledger_ms
        expired = sorted(
            (item.lease_expires_at, name)
            for name, item in self.reservations.items()
            if is_reserved(item) and item.lease_expires_at <= now
        )
        return [self._expire(name, self.reservations[name]) for _, name in expired[:limit]]

    def _expire(self, name: str, item: Reservation) -> Settlement:
        settlement = Settlement(
            reservation=name,
            tenant=item.tenant,
            account=item.account,
            kind=item.kind,
            created_at=item.created_at,
            outcome=UNKNOWN,
        )
        self.settle(settlement)
        return settlement

    def refund(self, tenant: int, name: str, reason: str) -> tuple[RefundResult, Reservation] | None:
        at, reservation = self.read_clock(), self.reservations.get(name)
        if reservation is None or reservation.tenant != tenant:
            return None
        result = RefundResult.REFUNDED
        if reservation.refund:
            result = RefundResult.ALREADY_REFUNDED
        elif reservation.state in FREE_STATES:
            result = RefundResult.NOTHING_CHARGED
        elif reservation.state is UNKNOWN:
            reservation.refund = Refund(at.server_ms, reason, 0, reservation.money_holds.get(Window.DAY, 0))
        elif reservation.cost is None:
            result = RefundResult.RUNNING
        else:
            reservation.refund = Refund(at.server_ms, reason, reservation.cost.count, reservation.cost.money_fen)
        if result is RefundResult.REFUNDED:
            self._store_tenant(tenant)
        return result, copy.deepcopy(reservation).to_server_time(at.offset_ms)

    def reopen_account(self, account: int) -> None:
        state = self.account_state(account)
        state.status, state.next_probe_at, state.count, state.money = AccountStatus.OPEN, 0, None, None
        state.closed_at, state.reopened_at = 0, self.read_clock().ledger_ms

    def claim_balance_check(self, account: int, *, count_only: bool) -> BalanceCheck | None:
        candidate, now = self._candidate(account), self.read_clock().ledger_ms
        is_due = accounts.is_balance_check_due(candidate.state, candidate.policy, now, count_only=count_only)
        if account not in self.account_policies or not is_due or candidate.state.last_finished_task is None:
            return None
        candidate.state.last_balance_check_at = now
        candidate.state.failed_balance_checks += 1
        return BalanceCheck(account, candidate.state.last_finished_task.reservation, now)

    def record_balance_check(self, check: BalanceCheck, balance: Balance) -> None:
        candidate, now = self._candidate(check.account), self.read_clock().ledger_ms
        claimed_at = min(check.claimed_at, now)
        accounts.record_balance_check(candidate.state, candidate.policy, check.reservation, balance, claimed_at, now)
        self._store_inference(candidate)

    def complete_task(self, name: str, check: CheckResult, claimed_at: int, *, succeeded: bool) -> Cost:
        """Finish an accepted submission whose task has ended.

        A check may return the balance at the end of the task, which may be as old as its submission: if anything else
        happened on the account since, the reading counts as that old, unless checks return the current balance.
        """
        at, reservation = self.read_clock(), self.reservations[name]
        candidate, claimed_at = self._candidate(reservation.account), min(claimed_at, at.ledger_ms)
        state, policy = candidate.state, candidate.policy
        state.open_submissions -= 1
        is_current = accounts.was_exclusive(state, reservation) or state.live_balance_checks
        requested_at = claimed_at if is_current else min(reservation.dispatched_at, at.ledger_ms)
        accounts.observe_balance(state, policy, check.balance, ReadingSource.CHECK, requested_at, at.ledger_ms)
        cost = accounts.compute_cost(state, policy, reservation, check.balance, succeeded=succeeded)
        if succeeded:
            accounts.store_finished_task(state, name, check.balance, claimed_at)
        accounts.finish_charge(state, reservation, check.balance, requested_at, at.ledger_ms)
        reservation.money_holds, reservation.cost, reservation.succeeded = {}, cost, succeeded
        reservation.balance_before = reservation.balance_after = None
        if reservation.refund:
            reservation.refund = replace(reservation.refund, count=cost.count, money_fen=cost.money_fen)
        tenant = self._store_tenant(reservation.tenant)
        for limit in self._tenant_policy(reservation.tenant).limits:
            key, counters = reservation.window_starts.get(limit.window), all_counters(tenant, limit.window)
            counter = next((counter for counter in counters if counter_key(counter) == key), None)
            if limit.money_fen is not None and counter and not reservation.refund:
                overrun = min(max(counter.money_fen - limit.money_fen, 0), cost.money_fen)
                counter.overrun_fen += overrun
                reservation.overrun_fen = max(reservation.overrun_fen, overrun)
        self._store_inference(candidate)
        return cost

    def account_state(self, account: int) -> AccountState:
        return self.accounts.setdefault(account, AccountState())

    def _tenant_policy(self, tenant: int) -> TenantPolicy:
        return self.tenant_policies.get(tenant, TenantPolicy())

    def _store_tenant(self, tenant: int) -> TenantState:
        self.tenants[tenant] = self.tenant_state(tenant)
        return self.tenants[tenant]

    def _candidate(self, account: int) -> Candidate:
        return Candidate(account, self.account_policies.get(account, AccountPolicy()), self.account_state(account))

    def _grant_again(self, reservation: Reservation) -> Grant:
        if reservation.state in FREE_STATES:
            raise LedgerUnavailable("given up")
        at = self.read_clock()
        return Grant(reservation.account, at.server_ms, reservation.lease_expires_at - at.offset_ms)

    def _find_replay(self, request: ReserveRequest) -> Verdict | None:
        if request.idempotency is None:
            return None
        key = request.tenant, request.idempotency.key_digest
        name, digests, expires_at = self.idempotency_keys.get(key, ("", "", 0))
        reservation = self.reservations.get(name)
        if reservation is None or expires_at <= self.now_ms:
            return None
        if digests.split()[0] != request.idempotency.content_digest:
            return KeyReuse(self.now_ms)
        return InFlight(self.now_ms) if is_reserved(reservation) else Replay(name, reservation.state, self.now_ms)

    def find_replay(self, tenant: int, idempotency: Idempotency) -> Verdict | None:
        name, digests, _ = self.idempotency_keys.get((tenant, idempotency.key_digest), ("", "", 0))
        reservation = self.reservations.get(name)
        if reservation is None or digests.split()[1:] != [idempotency.source_digest]:
            return None
        return InFlight(self.now_ms) if is_reserved(reservation) else Replay(name, reservation.state, self.now_ms)

    def _store_key(self, tenant: int, source: ReserveRequest | Settlement, *, overwrites: bool) -> None:
        if idempotency := source.idempotency:
            key, expires_at = (tenant, idempotency.key_digest), self.now_ms + KEEP_IDEMPOTENCY_KEY_MS
            if overwrites or self.idempotency_keys.get(key, ("", "", 0))[2] <= self.now_ms:
                digests = " ".join(filter(None, (idempotency.content_digest, idempotency.source_digest)))
                self.idempotency_keys[key] = source.reservation, digests, expires_at

    def _choose(
        self,
        tenant: TenantState,
        policy: TenantPolicy,
        account_ids: Sequence[int],
        kind: Kind,
        at: ClockReading,
        *,
        checks_tasks: bool,
    ) -> tuple[Candidate | PolicyDenial | NoAccount, dict[Window, int]]:
        """Return the first account that can pay and what is held for it; the tenant's policies come first."""
        candidates = [self._candidate(item) for item in account_ids if item in self.account_policies]
        chosen, retry_at = choose_account(candidates, policy.spending_mode, kind, at.ledger_ms)
        violations = find_violations(tenant, policy, at.server_ms) if checks_tasks else []
        holds: dict[Window, int] = {}
        if chosen:
            price = accounts.price_hold(chosen.state, chosen.policy, kind)
            refused, holds = compute_holds(tenant, policy.limits, price, at.server_ms)
            violations += refused
        if violations:
            return PolicyDenial(tuple(violations), at.server_ms), {}
        return chosen or NoAccount(retry_at and retry_at - at.offset_ms, at.server_ms), holds

    def _assign_account(
        self, account: Candidate, reservation: Reservation, holds: dict[Window, int], mode: SpendingMode, now: int
    ) -> None:
        """Assign a reservation to an account and remember its balance.

        A probe remembers none: its acceptance means that the account was topped up.
        """
        state = account.state
        if account.is_probe:
            state.next_probe_at = now + PROBE_INTERVAL_MS
        state.submission_seq += 1
        reservation.account, reservation.dispatched_at, reservation.submission_seq = (
            account.id,
            now,
            state.submission_seq,
        )
        reservation.exclusive, reservation.balance_exact = state.open_submissions == 0, state.unaccounted_charges == 0
        reservation.expects_prepaid = state.count.value > state.unaccounted_charges if state.count else None
        reservation.prepaid_only = mode is SpendingMode.COUNT_ONLY
        reservation.balance_before = None
        if state.count and state.money and not account.is_probe:
            reservation.balance_before = BalanceSnapshot(state.count.value, state.money.value)
        reservation.money_holds = holds
        state.open_submissions += 1
        state.unsettled += 1
        accounts.mark_charge_pending(state, reservation)
        accounts.add_expected_charge(state, account.policy, reservation.kind, 1)

    def _recreate(self, settlement: Settlement, at: ClockReading) -> Reservation:
        """Recreate a lost reservation as unknown, in the windows of its creation; a free one is a tombstone."""
        reservation = self.reservations[settlement.reservation] = Reservation(
            settlement.outcome,
            settlement.tenant,
            settlement.account,
            settlement.kind,
            created_at=settlement.created_at,
            dispatched_at=min(settlement.created_at, at.ledger_ms),
            lease_expires_at=settlement.created_at,
        )
        if settlement.outcome in FREE_STATES:
            return reservation
        if settlement.idempotency:
            reservation.key_digest = settlement.idempotency.key_digest
        self._store_key(settlement.tenant, settlement, overwrites=False)
        reservation.state, reservation.settled_at = UNKNOWN, at.ledger_ms
        reservation.window_starts = {window: window_bounds(window, reservation.created_at)[0] for window in Window}
        tenant = self.tenants[settlement.tenant] = self.tenant_state(settlement.tenant)
        roll_windows(tenant, max(at.server_ms, reservation.created_at))
        state = self.account_state(settlement.account)
        state.unknown_outcomes += 1
        state.expected_drop.charges += 1
        state.expected_drop.unpriced += 1
        accounts.mark_charge_pending(state, reservation)
        accounts.mark_untracked(state, reservation, at.ledger_ms + LATE_CHARGE_MS)
        self._store_tenant(settlement.tenant)
        return reservation

    def _accept(
        self,
        settlement: Settlement,
        reservation: Reservation,
        account: Candidate,
        balance: Balance,
        at: ClockReading,
        *,
        was_unknown: bool,
    ) -> None:
        account.state.open_submissions += 1
        reservation.balance_after = balance
        if reservation.refund:
            reservation.refund = replace(reservation.refund, count=0, money_fen=0)  # until its task has ended
        accounts.open_on_acceptance(account.state, reservation.dispatched_at)
        if was_unknown:
            accounts.mark_charge_pending(account.state, reservation)
            accounts.add_expected_charge(account.state, account.policy, reservation.kind, 1)
        self._create_task(settlement, reservation, at)

    def _release(
        self,
        name: str,
        reservation: Reservation,
        account: Candidate,
        account_status: AccountStatus | None,
        at: ClockReading,
        *,
        still_expected: bool,
    ) -> None:
        """Give back what a refused or unsent submission held, and its idempotency key."""
        reservation.money_holds, reservation.refund = {}, None
        accounts.cancel_expected_charge(account.state, account.policy, reservation, still_expected=still_expected)
        if account_status:
            accounts.close_on_refusal(account.state, account_status, reservation.dispatched_at, at.ledger_ms)
        key = reservation.tenant, reservation.key_digest or ""
        if self.idempotency_keys.get(key, ("",))[0] == name:
            del self.idempotency_keys[key]

    def _create_task(self, settlement: Settlement, reservation: Reservation, at: ClockReading) -> None:
        new_task, created_at = settlement.new_task, reservation.created_at
        assert new_task
        self.tasks[settlement.reservation] = Task(
            id=new_task.id,
            reservation=settlement.reservation,
            tenant=reservation.tenant,
            account=reservation.account,
            kind=reservation.kind,
            state=State.QUEUED,
            created_at=created_at,
            updated_at=created_at,
            finished_at=None,
            options=new_task.options,
            metadata=new_task.metadata,
            artifacts=(),
            error=None,
            cost=Cost(0, 0, CostBasis.UNKNOWN),
            version=1,
            last_checked_at=created_at,
            webhook_url=new_task.webhook_url,
            trace_context=new_task.trace_context,
        )
        self.due_checks[settlement.reservation] = at.ledger_ms + self.retention.check_interval_ms

    def _store_inference(self, account: Candidate) -> None:
        """Store an inferred charge in its reservation."""
        inference = account.state.pending_inference
        if inference and inference.inferred_charge:
            if inference.reservation in self.reservations:
                accounts.store_inference(account.state, account.policy, self.reservations[inference.reservation])
            account.state.pending_inference = None


def find_violations(tenant: TenantState, policy: TenantPolicy, now: int) -> list[Violation]:
    violations = []
    for limit in policy.limits:
        counter = tenant.windows[limit.window]
        if limit.tasks is not None and counter.tasks + counter.tasks_reserved >= limit.tasks:
            violations.append(_make_violation(limit.window, UNIT_TASKS, limit.tasks, now))
    if policy.max_active is not None and tenant.active_tasks >= policy.max_active:
        violations.append(Violation(MAX_ACTIVE_POLICY, policy.max_active, None))
    return violations


def compute_holds(
    tenant: TenantState, limits: Sequence[Limit], price: int | None, now: int
) -> tuple[list[Violation], dict[Window, int]]:
    """Return the limits on money that refuse a price, and what each window holds for it.

    Without a known price a limited window holds all that remains, an unlimited one the most of those.
    """
    refused: list[Violation] = []
    holds: dict[Window, int] = {}
    for limit in limits:
        if limit.money_fen is None:
            continue
        counter = tenant.windows[limit.window]
        remaining = limit.money_fen - counter.money_fen - counter.money_reserved_fen
        hold = max(remaining, 1) if price is None else price
        if hold > max(remaining, 0):
            refused.append(_make_violation(limit.window, UNIT_MONEY, limit.money_fen, now))
        holds[limit.window] = hold
    unlimited_hold = max(holds.values(), default=0) if price is None else price
    holds = {window: holds.get(window, unlimited_hold) for window in Window}
    return refused, holds if any(holds.values()) else {}


def _make_violation(window: Window, unit: str, limit: int, now: int) -> Violation:
    return Violation(policy_name(window, unit), limit, window_bounds(window, now)[1])
