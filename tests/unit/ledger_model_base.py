"""Simulation of a ledger and a vendor whose responses are lost, late, incomplete or reordered.

Only the gateway uses the accounts. Conclusions of the ledger are compared with the vendor's real balances.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from service.domain.availability import PROBE_INTERVAL_MS
from service.domain.ledger import AccountState, AccountStatus, Balance, Grant, InferredCharge, ReservationState, Verdict
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, SpendingMode, TenantPolicy
from service.storage.redis import LATE_CHARGE_MS
from service.usecases.ports import BalanceCheck, CheckResult, ClaimedCheck, NewTask, ReserveRequest, Settlement
from tests.fakes import FakeLedger
from tests.unit.vendor_model import NO_BALANCE, Progress, VendorAccount, VendorModel

T = TypeVar("T")

MONEY_TENANT, PREPAID_TENANT = 1, 2
"""A tenant that may spend money, and a prepaid-only one."""
ACCOUNTS = (3, 4)
PRICES = {Kind.UPSCALE: 300, Kind.SEAMLESS: 100}

floors = st.sampled_from([0, 0, 2])


@dataclass
class SimulatedSubmission:
    """A submission: `arrived` at the vendor, `deadline` once it was settled as unknown.

    `bound`: the ledger knew enough to keep the floors; `prepaid_only`: it must not spend money.
    """

    name: str
    tenant: int
    account: int
    kind: Kind
    created: int
    bound: bool
    prepaid_only: bool
    arrived: bool = False
    accepted: bool = False
    figures: Balance = NO_BALANCE
    deadline: int | None = None
    settled: bool = False


def pick_item(items: list[T], number: int) -> T | None:
    return items[number % len(items)] if items else None


class LedgerModelBase(RuleBasedStateMachine):
    """Steps of a submission, and the invariants."""

    @initialize(
        late=st.booleans(),
        now=st.booleans(),
        count=st.integers(0, 5),
        money=st.integers(0, 10),
        floor_count=floors,
        floor_money=floors,
        priced=st.booleans(),
    )
    def initialize_ledger(
        self, count: int, money: int, floor_count: int, floor_money: int, *, late: bool, now: bool, priced: bool
    ) -> None:
        self.vendor = VendorModel(
            late, now, PRICES, {account: VendorAccount(count, money * 100) for account in ACCOUNTS}
        )
        self.ledger = FakeLedger()
        self.ledger.tenant_policies = {
            MONEY_TENANT: TenantPolicy(),
            PREPAID_TENANT: TenantPolicy(spending_mode=SpendingMode.COUNT_ONLY),
        }
        self.policy = AccountPolicy(floor_count, floor_money * 100, PRICES if priced else {})
        self.ledger.account_policies = dict.fromkeys(ACCOUNTS, self.policy)
        self.submissions: dict[str, SimulatedSubmission] = {}
        self.claimed_checks: list[tuple[ClaimedCheck, CheckResult | None]] = []
        self.balance_checks: list[tuple[BalanceCheck, Balance | None]] = []
        self.uncertain_accounts: set[int] = set()
        self.topped_up_accounts: set[int] = set()

    def run_call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a call of the fake ledger, which never blocks, and advance the time."""
        self.ledger.clock.now_ms += 1
        try:
            work.send(None)
        except StopIteration as done:
            result: T = done.value
            return result
        raise AssertionError("it waited")

    def account_state(self, account: int) -> AccountState:
        return self.ledger.states_by_account.get(account, AccountState())

    def pick_submission(self, number: int, **attributes: bool) -> SimulatedSubmission | None:
        candidates = [
            submission
            for submission in self.submissions.values()
            if all(getattr(submission, k) == v for k, v in attributes.items())
        ]
        return pick_item(candidates, number)

    def record_grant(self, name: str, tenant: int, kind: Kind, verdict: Verdict) -> None:
        if isinstance(verdict, Grant):
            state = self.account_state(verdict.account)
            probes = state.next_probe_at == self.ledger.clock.now_ms + PROBE_INTERVAL_MS
            bound = bool(state.count and state.money) and not probes and verdict.account not in self.uncertain_accounts
            created = self.ledger.reservations[name].created_at
            self.submissions[name] = SimulatedSubmission(
                name, tenant, verdict.account, kind, created, bound, tenant == PREPAID_TENANT
            )

    def deliver_to_vendor(self, sent: SimulatedSubmission, reported: tuple[bool, bool] = (True, True)) -> None:
        self.ledger.clock.now_ms += 1
        with self.assert_floors_kept(sent):
            accepted = self.vendor.submit(sent.name, sent.account, sent.kind)
        balance = self.vendor.accounts[sent.account].balance() if accepted else Balance()
        sent.arrived, sent.accepted = True, accepted
        sent.figures = Balance(balance.count if reported[0] else None, balance.money_fen if reported[1] else None)

    def settle_with_response(self, sent: SimulatedSubmission) -> None:
        if sent.accepted:
            draft = NewTask(f"task_{sent.name}", msgspec.Raw(b"{}"), msgspec.Raw(b"{}"))
            self.settle_submission(sent, ReservationState.ACCEPTED, balance=sent.figures, new_task=draft)
        elif sent.deadline or not self.try_failover(sent, AccountStatus.EXHAUSTED):
            self.settle_submission(sent, ReservationState.REFUSED, account_status=AccountStatus.EXHAUSTED)

    def try_failover(self, sent: SimulatedSubmission, closes: AccountStatus | None) -> bool:
        """Return whether the submission moved to the other account."""
        other = tuple(account for account in ACCOUNTS if account != sent.account)
        verdict = self.run_call(
            self.ledger.change_account(ReserveRequest(sent.name, sent.tenant, other, sent.kind), sent.account, closes)
        )
        self.record_grant(sent.name, sent.tenant, sent.kind, verdict)
        return isinstance(verdict, Grant)

    def settle_as_unknown(self, sent: SimulatedSubmission) -> None:
        """Settle as unknown a submission that has arrived by now or never will.

        A prepaid-only one is no longer protected from being overtaken.
        """
        sent.arrived = True
        self.settle_submission(sent, ReservationState.UNKNOWN)
        sent.settled, sent.deadline = False, self.ledger.clock.now_ms + LATE_CHARGE_MS
        sent.prepaid_only = False

    def settle_submission(self, sent: SimulatedSubmission, outcome: ReservationState, **more: Any) -> None:
        settlement = Settlement(
            reservation=sent.name,
            tenant=sent.tenant,
            account=sent.account,
            kind=sent.kind,
            created_at=sent.created,
            outcome=outcome,
            **more,
        )
        assert self.run_call(self.ledger.settle(settlement))
        sent.settled = True
        if not sent.arrived and outcome is ReservationState.NOT_SENT:
            del self.submissions[sent.name]

    def finish_task(self, name: str, *, succeeds: bool) -> None:
        self.ledger.clock.now_ms += 1
        with self.assert_floors_kept(self.submissions[name]):
            self.vendor.finish(name, succeeds=succeeds)

    def finish_unsettled_task(self, sent: SimulatedSubmission) -> None:
        job = self.vendor.tasks.get(sent.name)
        if not sent.settled and job and job.progress is Progress.RUNNING:
            self.finish_task(sent.name, succeeds=True)

    @contextmanager
    def assert_floors_kept(self, sent: SimulatedSubmission) -> Iterator[None]:
        """Assert that a charge in the block keeps the floors and the spending mode."""
        holding = self.vendor.accounts[sent.account]
        before = holding.balance()
        yield
        if not sent.bound:
            return
        assert holding.count == before.count or holding.count >= self.policy.floor_count
        if holding.money != before.money_fen:
            assert not sent.prepaid_only
            assert holding.money >= self.policy.floor_money_fen or not self.policy.max_price

    @invariant()
    def no_unexplained_spending(self) -> None:
        for account in ACCOUNTS:
            state = self.account_state(account)
            assert (state.unexplained_count, state.unexplained_money_fen) == (0, 0)

    @invariant()
    def balances_are_possible(self) -> None:
        """Real balances are at least the known ones less what unaccounted submissions may have taken."""
        for account in ACCOUNTS:
            state, holding = self.account_state(account), self.vendor.accounts[account]
            assert (
                min(
                    state.open_submissions,
                    state.unsettled,
                    state.pending_charges,
                    state.pending_prepaid_only,
                    state.untracked_charges,
                    state.unknown_outcomes,
                )
                >= 0
            )
            if account in self.uncertain_accounts and state.unaccounted_charges:
                continue
            self.uncertain_accounts.discard(account)
            assert state.count is None or state.count.value - state.unaccounted_charges <= holding.count
            assert (
                state.money is None
                or state.money.value - max(PRICES.values()) * state.unaccounted_charges <= holding.money
            )

    @invariant()
    def inferred_charges_are_right(self) -> None:
        """An inferred charge is right, unless a top-up hid it."""
        for name, sent in self.submissions.items():
            suggests, job = self.ledger.reservations[name].inferred_charge, self.vendor.tasks.get(name)
            if suggests and sent.account not in self.topped_up_accounts:
                assert suggests is (InferredCharge.CHARGED if job and job.was_charged else InferredCharge.NOT_CHARGED)
