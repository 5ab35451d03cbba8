"""What the fakes hold in the place of a store, and how it is looked up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import AccountState, Candidate, DayUsage, Reservation, TenantState
from service.domain.tasks import Task
from service.domain.tenants import AccountPolicy, TenantPolicy
from service.storage.ledger import DAY, Spans
from service.usecases.ports import Delivery
from service.usecases.task_cache import Board, Pace
from tests.fakes.clock import FakeClock, Stopwatch
from tests.model import ledger_model


@dataclass
class Memory:
    """What the store would hold. `away` makes every call fail as when Redis does not answer."""

    clock: FakeClock = field(default_factory=FakeClock)
    spans: Spans = field(default_factory=Spans)
    away: bool = False
    tenant_policies: dict[int, TenantPolicy] = field(default_factory=dict)
    account_policies: dict[int, AccountPolicy] = field(default_factory=dict)
    tenants: dict[int, TenantState] = field(default_factory=dict)
    account_states: dict[int, AccountState] = field(default_factory=dict)
    reservations: dict[str, Reservation] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    due: dict[str, int] = field(default_factory=dict)
    claims: dict[str, int] = field(default_factory=dict)
    interest: dict[str, int] = field(default_factory=dict)
    misses: dict[str, int] = field(default_factory=dict)
    board: Board = field(default_factory=lambda: Board(Pace(2.5)))
    patience: dict[str, tuple[Stopwatch, Stopwatch]] = field(default_factory=dict)
    keys: dict[tuple[int, str], tuple[str, str, int]] = field(default_factory=dict)
    deliveries: dict[str, Delivery] = field(default_factory=dict)
    queued: dict[str, int] = field(default_factory=dict)
    leased: dict[str, int] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    failing: dict[str, int] = field(default_factory=dict)
    given_up: dict[str, int] = field(default_factory=dict)
    days: dict[tuple[int, int], DayUsage] = field(default_factory=dict)

    def _answer(self) -> None:
        if self.away:
            raise LedgerUnavailable("away", retry_after=2)

    def _tenant(self, tenant: int) -> TenantState:
        return self.tenants.setdefault(tenant, TenantState())

    def _limits(self, tenant: int) -> TenantPolicy:
        return self.tenant_policies.get(tenant, TenantPolicy())

    def _account(self, account: int) -> AccountState:
        return self.account_states.setdefault(account, AccountState())

    def _candidate(self, account: int) -> Candidate:
        return Candidate(account, self.account_policies.get(account, AccountPolicy()), self._account(account))

    def _candidates(self, accounts: Sequence[int]) -> list[Candidate]:
        return [self._candidate(each) for each in accounts if each in self.account_policies]

    def _day(self, reservation: Reservation) -> DayUsage:
        return self.days.setdefault((reservation.tenant, reservation.created // DAY), DayUsage())

    def _resolve(self, account: Candidate) -> None:
        """Tell a submission in doubt what was found out of it."""
        doubt = account.state.doubt
        if doubt and doubt.suggests:
            if doubt.reservation in self.reservations:
                ledger_model.tell(account.state, account.policy, self.reservations[doubt.reservation])
            account.state.doubt = None
