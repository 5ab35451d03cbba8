"""State shared by the fakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import AccountState, Candidate, DayUsage, Reservation, TenantState
from service.domain.tasks import Task
from service.domain.tenants import AccountPolicy, TenantPolicy
from service.storage.ledger import Retention
from service.storage.redis import DAY_MS
from service.usecases.caches import DurationEstimator, TaskCache
from service.usecases.ports import Delivery
from tests.fakes.clock import FakeClock, Stopwatch
from tests.model import ledger_model
from tests.support.tasks import make_retention


@dataclass
class InMemoryStore:
    """What Redis would store; calls raise LedgerUnavailable while `is_unavailable`."""

    clock: FakeClock = field(default_factory=FakeClock)
    retention: Retention = field(default_factory=make_retention)
    is_unavailable: bool = False
    tenant_policies: dict[int, TenantPolicy] = field(default_factory=dict)
    account_policies: dict[int, AccountPolicy] = field(default_factory=dict)
    tenants: dict[int, TenantState] = field(default_factory=dict)
    states_by_account: dict[int, AccountState] = field(default_factory=dict)
    reservations: dict[str, Reservation] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    due_checks: dict[str, int] = field(default_factory=dict)
    claimed_checks: dict[str, int] = field(default_factory=dict)
    watched_until: dict[str, int] = field(default_factory=dict)
    failed_checks: dict[str, int] = field(default_factory=dict)
    cache: TaskCache = field(default_factory=lambda: TaskCache(DurationEstimator(2.5)))
    failure_stopwatches: dict[str, tuple[Stopwatch, Stopwatch]] = field(default_factory=dict)
    idempotency_keys: dict[tuple[int, str], tuple[str, str, int]] = field(default_factory=dict)
    deliveries: dict[str, Delivery] = field(default_factory=dict)
    queued_deliveries: dict[str, int] = field(default_factory=dict)
    leased_deliveries: dict[str, int] = field(default_factory=dict)
    receiver_turns: dict[str, int] = field(default_factory=dict)
    failing_until: dict[str, int] = field(default_factory=dict)
    failed_deliveries: dict[str, int] = field(default_factory=dict)
    usage_days: dict[tuple[int, int], DayUsage] = field(default_factory=dict)

    def _raise_if_unavailable(self) -> None:
        if self.is_unavailable:
            raise LedgerUnavailable("away", retry_after=2)

    def _tenant_state(self, tenant: int) -> TenantState:
        return self.tenants.setdefault(tenant, TenantState())

    def _tenant_policy(self, tenant: int) -> TenantPolicy:
        return self.tenant_policies.get(tenant, TenantPolicy())

    def _account_state(self, account: int) -> AccountState:
        return self.states_by_account.setdefault(account, AccountState())

    def _candidate(self, account: int) -> Candidate:
        return Candidate(account, self.account_policies.get(account, AccountPolicy()), self._account_state(account))

    def _candidates(self, accounts: Sequence[int]) -> list[Candidate]:
        return [self._candidate(account) for account in accounts if account in self.account_policies]

    def _usage_day(self, reservation: Reservation) -> DayUsage:
        return self.usage_days.setdefault((reservation.tenant, reservation.created_at // DAY_MS), DayUsage())

    def _store_inference(self, account: Candidate) -> None:
        """Store an inferred charge in its reservation."""
        inference = account.state.pending_inference
        if inference and inference.inferred_charge:
            if inference.reservation in self.reservations:
                ledger_model.store_inference(account.state, account.policy, self.reservations[inference.reservation])
            account.state.pending_inference = None
