"""A state machine that runs the scripts and their model in any order."""

from __future__ import annotations

from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, initialize, multiple, precondition, rule

from service.domain.ledger import AccountStatus, Balance, Idempotency, ReservationState
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, Limit, SpendingMode, TenantPolicy, Window
from service.usecases.ports import CheckOutcome, ClaimedDelivery, DeliveryResult
from tests.model.ledger import is_reserved
from tests.storage import ledger_strategies as draw
from tests.storage.ledger_actions import LedgerActions
from tests.storage.ledger_comparison import ACCOUNTS, TENANT, is_provisional
from tests.storage.ledger_strategies import KINDS, SubmissionPlan, is_truthful

T = TypeVar("T")

accounts = st.sampled_from(ACCOUNTS)
tenants = st.sampled_from([TENANT] * 5 + [9])
deleted_names = st.sampled_from([""] * 9 + ["t", "a", "b"])
few_or_none = st.sampled_from([None, None, 0, 1, 2])
mostly_false = st.sampled_from([False, False, False, True])
short_delays = st.sampled_from([1, 700])
finish_choices = st.sampled_from([None, True, True, False])


def nth_newest(items: list[T], number: int) -> T:
    return items[number % len(items)]


class LedgerMachine(LedgerActions):
    """The rules of the ledger. Fewer rules are drawn more often each, so some combine several operations."""

    deliveries_in_progress: Bundle[ClaimedDelivery] = Bundle("deliveries_in_progress")

    @initialize(
        late=st.booleans(),
        now=st.booleans(),
        count=draw.counts,
        money=draw.amounts,
        tenant=draw.unlimited_policies,
        plans=draw.plan_sequences,
    )
    def run_first_submissions(
        self, count: int, money: int, tenant: TenantPolicy, plans: list[SubmissionPlan], *, late: bool, now: bool
    ) -> None:
        """Run submissions that do not overlap: these reveal most about an account."""
        self.set_upstream(late=late, now=now, count=count, money=money)
        self.write_policies(tenant, AccountPolicy(), AccountPolicy())
        for plan in plans:
            self.run_submission(ACCOUNTS[0], plan, 1)
        if all(is_truthful(plan) for plan in plans):
            self.check_conclusions(ACCOUNTS[0])

    @rule(tenant=draw.tenant_policies, first=draw.account_policies, second=draw.account_policies, gone=deleted_names)
    def change_limits(self, tenant: TenantPolicy, first: AccountPolicy, second: AccountPolicy, gone: str) -> None:
        self.write_policies(tenant, first, second)
        if gone:
            self.delete_from_registry(gone)

    @rule(account=accounts, count=draw.counts, money=draw.amounts, opens=mostly_false)
    def change_balance(self, account: int, count: int, money: int, *, opens: bool) -> None:
        """Change the balance from outside; an operator may reopen the account."""
        self.upstream.balances[account] = Balance(count, money)
        if opens:
            self.compare(self.ledger.reopen_account(account), self.model.reopen_account, account)

    @rule(kind=draw.kinds, order=draw.account_orders, after=draw.answer_delays, times=st.sampled_from([1, 1, 3]))
    def submit(self, kind: Kind, order: tuple[int, ...], after: int, times: int) -> None:
        self.advance_clock(after)
        for _ in range(times):
            self.reserve(kind, order, None)

    @rule(
        key=st.sampled_from(["k1", "k2"]),
        outcome=draw.outcomes | st.just(ReservationState.UNKNOWN),
        late=draw.outcomes,
        pause=st.sampled_from([0, 86_399_999, 86_400_000]),
    )
    def submit_with_key(self, key: str, outcome: ReservationState, late: ReservationState, pause: int) -> None:
        """Submit with an idempotency key, and again before and after the outcomes, also with other content."""
        first, other = Idempotency(key, "c1"), Idempotency(key, "c2")
        name = self.reserve(KINDS[0], ACCOUNTS, first)
        for idempotency in (first, other):
            self.reserve(KINDS[0], ACCOUNTS, idempotency)
        for result, milliseconds in ((outcome, pause), (late, 0)):
            if name:
                self.settle(name, result, None)
            self.advance_clock(milliseconds)
            self.reserve(KINDS[1], ACCOUNTS, other)
            self.reserve(KINDS[0], ACCOUNTS, first)
        self.settle(self.next_name(), outcome, None, idempotency=other)

    @rule(
        window=st.sampled_from(Window),
        tasks=few_or_none,
        money=st.sampled_from([None, None, 0, 99, 100, 250, 300]),
        active=few_or_none,
        kind=draw.kinds,
        order=draw.account_orders,
        times=st.integers(1, 4),
        moves=st.booleans(),
    )
    def submit_at_limits(
        self,
        window: Window,
        tasks: int | None,
        money: int | None,
        active: int | None,
        kind: Kind,
        order: tuple[int, ...],
        times: int,
        *,
        moves: bool,
    ) -> None:
        """Submit up to limits that leave so much, and move those that an account does not take to the other."""
        state = self.tenant_state()
        counter = state.windows[window]
        limit = Limit(
            window,
            tasks=None if tasks is None else counter.tasks + counter.tasks_reserved + tasks,
            money_fen=None if money is None else counter.money_fen + counter.money_reserved_fen + money,
        )
        self.write_tenant_policy(TenantPolicy((limit,), None if active is None else state.active_tasks + active))
        for _ in range(times):
            name = self.reserve(kind, order, None)
            if name and moves:
                left = self.model.reservations[name].account
                self.change_account(name, left, tuple(account for account in ACCOUNTS if account != left), None)
        self.write_tenant_policy(TenantPolicy())

    @rule(
        account=accounts,
        kind=draw.kinds,
        uses=st.integers(0, 2),
        money=st.sampled_from([0, 100, 101, 200, 250]),
        price=st.sampled_from([None, 100, 250]),
        mode=st.sampled_from(SpendingMode),
    )
    def submit_at_floors(
        self, account: int, kind: Kind, uses: int, money: int, price: int | None, mode: SpendingMode
    ) -> None:
        """Submit up to floors so far below the known balance."""
        state = self.model.account_state(account)
        count, fen = state.count.value if state.count else 0, state.money.value if state.money else 0
        floors = AccountPolicy(max(count - uses, 0), max(fen - money, 0), {} if price is None else {kind: price})
        first, second = (floors if account == item else AccountPolicy() for item in ACCOUNTS)
        self.write_policies(TenantPolicy(spending_mode=mode), first, second)
        for _ in range(3):
            self.reserve(kind, (account,), None)
        self.claim_balance_check(account, count_only=mode is SpendingMode.COUNT_ONLY)
        self.write_policies(TenantPolicy(), AccountPolicy(), AccountPolicy())

    @rule(account=accounts, kind=draw.kinds, after=draw.answer_delays)
    def mix_spending_modes(self, account: int, kind: Kind, after: int) -> None:
        """Submit prepaid-only tasks up to the number of uses, then one that may spend money."""
        self.write_tenant_policy(TenantPolicy(spending_mode=SpendingMode.COUNT_ONLY))
        for _ in range(3):
            self.reserve(kind, (account,), None)
        self.advance_clock(after)
        self.write_tenant_policy(TenantPolicy())
        self.reserve(kind, (account,), None)

    @rule(
        account=accounts,
        plans=draw.plan_sequences,
        after=short_delays,
        quiet=finish_choices,
        policy=st.none() | draw.money_limited_policies,
    )
    def run_submissions(
        self, account: int, plans: list[SubmissionPlan], after: int, quiet: bool | None, policy: TenantPolicy | None
    ) -> None:
        """Run submissions on one account without overlap, after finishing all others if `quiet` says so."""
        if quiet is not None:
            self.finish_all(succeeds=quiet)
        if policy:
            self.write_tenant_policy(policy)
        for plan in plans:
            self.run_submission(account, plan, after)

    @rule(number=draw.numbers, order=draw.account_orders, closes=draw.close_statuses, repeats=st.booleans())
    def move_submission(
        self, number: int, order: tuple[int, ...], closes: AccountStatus | None, *, repeats: bool
    ) -> None:
        name = self.ensure_reserved(number, order)
        if name is None:
            return
        left = self.model.reservations[name].account
        others = tuple(item for item in (order if len(order) > 1 else ACCOUNTS) if item != left)
        for _ in range(1 + repeats):
            self.change_account(name, left, others, closes)

    @rule(
        number=draw.numbers,
        outcome=draw.likely_outcomes,
        reported=draw.reported_balances,
        closes=draw.close_statuses,
        after=draw.answer_delays,
        charged=st.booleans(),
        late=st.booleans(),
        elsewhere=mostly_false,
    )
    def settle_submission(
        self,
        number: int,
        outcome: ReservationState,
        reported: Balance | None,
        closes: AccountStatus | None,
        after: int,
        *,
        charged: bool,
        late: bool,
        elsewhere: bool,
    ) -> None:
        name = self.choose_reservation(number, is_provisional) or self.ensure_reserved(number, ACCOUNTS)
        self.advance_clock(after)
        if name:
            outcome = ReservationState.REFUSED if closes else outcome
            self.settle(name, outcome, reported, closes, charged=charged, late=late, wrong_account=elsewhere)

    @rule(
        number=draw.numbers,
        outcome=draw.outcomes,
        reported=draw.reported_balances,
        closes=draw.close_statuses,
        idempotency=draw.idempotencies,
        lost=mostly_false,
    )
    def repeat_settled(
        self,
        number: int,
        outcome: ReservationState,
        reported: Balance | None,
        closes: AccountStatus | None,
        idempotency: Idempotency | None,
        *,
        lost: bool,
    ) -> None:
        """Repeat every operation on a settled or unknown reservation."""
        name = self.choose_reservation(number, lambda item: not is_reserved(item))
        if name is None or number == 0:
            name = self.next_name()
        elif lost:
            self.delete_reservation(name)
        self.change_account(name, ACCOUNTS[0], ACCOUNTS, closes)
        self.settle(name, outcome, reported, closes, idempotency)
        self.reserve_again(name, Kind.UPSCALE)

    @rule(
        most=st.integers(0, 3),
        number=draw.numbers,
        answered=draw.answers,
        reported=draw.reported_balances,
        after=draw.answer_delays,
    )
    def claim_and_record_check(
        self, most: int, number: int, answered: CheckOutcome, reported: Balance | None, after: int
    ) -> None:
        """Claim due checks, and record one in progress."""
        if most:
            self.claim_checks(most)
        self.advance_clock(after)
        if self.claimed_checks:
            self.record_check(nth_newest(self.claimed_checks, number), answered, reported)

    @rule(number=draw.numbers)
    def touch_any_task(self, number: int) -> None:
        if name := self.choose_reservation(number, lambda _: True):
            self.touch_task(name)

    @rule(
        account=accounts,
        count_only=st.booleans(),
        waits=st.booleans(),
        number=draw.numbers,
        reported=draw.reported_balances,
        after=draw.answer_delays,
    )
    def check_balance(
        self, account: int, number: int, reported: Balance | None, after: int, *, count_only: bool, waits: bool
    ) -> None:
        """Claim a balance check if it is due, and record one in progress."""
        if waits:
            self.advance_clock(60_000)
        self.claim_balance_check(account, count_only=count_only)
        self.advance_clock(after)
        if self.balance_checks and number < len(self.balance_checks):
            self.record_balance_check(self.balance_checks[number], reported)

    @rule(milliseconds=draw.clock_steps, most=st.integers(0, 3))
    def pass_time(self, milliseconds: int, most: int) -> None:
        """Advance the clock, and expire leases."""
        self.advance_clock(milliseconds)
        if most:
            self.compare(self.ledger.settle_expired(most), self.model.settle_expired, most)

    @rule(milliseconds=st.sampled_from([1, 700, 1_200_000, 90_000_000]), forth=st.sampled_from([0, 0, 500, 1_200_000]))
    def step_clock_back(self, milliseconds: int, forth: int) -> None:
        """Step the server's clock back, with calls before and after."""
        self.touch_task("nothing")
        self.advance_clock(-milliseconds)
        self.touch_task("nothing")
        self.advance_clock(forth)

    @rule(tenants=st.sampled_from([(TENANT,), ()]))
    def reset_clock(self, tenants: tuple[int, ...]) -> None:
        """Reset the ledger's clock to the server's."""
        self.compare(self.ledger.reset_clock(tenants, ACCOUNTS), self.model.reset_clock, tenants, ACCOUNTS)

    @precondition(lambda self: self.model.reservations)
    @rule(number=draw.numbers, tenant=tenants, reason=st.sampled_from(["", "它失败了", "a mistake"]))
    def refund_settled(self, number: int, tenant: int, reason: str) -> None:
        self.refund(tenant, self.choose_reservation(number, lambda item: not is_reserved(item)) or "never", reason)

    @rule(succeeds=st.booleans())
    def finish_tasks(self, *, succeeds: bool) -> None:
        """Finish six tasks, since few random sequences get as far as a delivery."""
        for _ in range(6):
            if name := self.reserve(kind=KINDS[0], accounts=ACCOUNTS, idempotency=None):
                self.settle(name, ReservationState.ACCEPTED, Balance())
        self.advance_clock(self.retention.check_interval_ms)
        self.claimed_checks = []
        self.claim_checks(9)
        for due in self.claimed_checks:
            self.record_check(due, CheckOutcome.SUCCEEDED if succeeds else CheckOutcome.FAILED)

    @rule(target=deliveries_in_progress, most=st.integers(1, 12))
    def claim_deliveries(self, most: int) -> Any:
        return multiple(*(self.compare(self.deliveries.claim(most), self.model.claim_deliveries, most) or ()))

    @rule(claimed=deliveries_in_progress, result=draw.delivery_results)
    def record_delivery(self, claimed: ClaimedDelivery, result: DeliveryResult) -> None:
        attempt = self.deliveries.record_attempt(claimed, result)
        self.compare(attempt, self.model.record_delivery, claimed, result)

    @rule(claimed=deliveries_in_progress)
    def redeliver(self, claimed: ClaimedDelivery) -> None:
        name = claimed.delivery.reservation
        self.compare(self.deliveries.redeliver(name), self.model.redeliver, name)
