"""The Lua scripts agree with the model for any sequence of calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, multiple, rule, run_state_machine_as_test

from service.domain.availability import PROBE_INTERVAL_MS
from service.domain.ledger import AccountStatus, Balance, Idempotency, ReservationState
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, Limit, SpendingMode, TenantPolicy, Window
from service.domain.thresholds import Threshold
from service.storage.deliveries import FAILING_MS, LEASE_MS
from service.storage.redis import DAY_MS, LATE_CHARGE_MS
from service.usecases.ports import CheckOutcome, ClaimedDelivery, DeliveryResult
from tests.model.ledger import is_reserved
from tests.storage import ledger_strategies as draw
from tests.storage.ledger_comparison import ACCOUNTS, TENANT, LedgerComparison
from tests.storage.ledger_strategies import KINDS, WEBHOOKS, SubmissionPlan, is_truthful, usual_plan
from tests.support.valkey import Valkey

MIN_EXAMPLES = 50
"""Fewer find few faults: there are many rules."""

ACCEPTED, REFUSED, UNKNOWN = ReservationState.ACCEPTED, ReservationState.REFUSED, ReservationState.UNKNOWN
RUNNING, NOT_FOUND, INVALID, NO_RESPONSE, SUCCEEDED, FAILED = (
    CheckOutcome.RUNNING,
    CheckOutcome.NOT_FOUND,
    CheckOutcome.INVALID,
    CheckOutcome.NO_RESPONSE,
    CheckOutcome.SUCCEEDED,
    CheckOutcome.FAILED,
)
accounts = st.sampled_from(ACCOUNTS)
few_or_none = st.sampled_from([None, None, 0, 1, 1, 2])
mostly_false = st.sampled_from([False, False, False, True])


class LedgerMachine(LedgerComparison):
    """The rules of the ledger. Fewer rules are drawn more often each, so most combine several operations."""

    deliveries_in_progress: Bundle[ClaimedDelivery] = Bundle("deliveries_in_progress")

    @initialize(
        late=st.booleans(),
        now=st.booleans(),
        count=draw.counts,
        money=draw.amounts,
        mode=st.sampled_from(SpendingMode),
        plans=draw.plan_sequences,
    )
    def run_first_submissions(
        self, count: int, money: int, mode: SpendingMode, plans: list[SubmissionPlan], *, late: bool, now: bool
    ) -> None:
        """Run submissions that do not overlap: these reveal most about an account."""
        self.set_upstream(late=late, now=now, count=count, money=money)
        self.write_policies(TenantPolicy(spending_mode=mode))
        for plan in plans:
            self.run_submission(ACCOUNTS[0], plan, 1)
        if all(is_truthful(plan) for plan in plans):
            self.check_conclusions(ACCOUNTS[0])

    # Policies and balances

    @rule(
        tenant=draw.tenant_policies,
        first=draw.account_policies,
        second=draw.account_policies,
        gone=st.sampled_from([""] * 9 + ["t", "a", "b"]),
    )
    def change_policies(self, tenant: TenantPolicy, first: AccountPolicy, second: AccountPolicy, gone: str) -> None:
        self.write_policies(tenant, first, second)
        if gone:
            self.delete_from_registry(gone)

    @rule(account=accounts, count=draw.counts, money=draw.amounts, opens=mostly_false)
    def change_balance(self, account: int, count: int, money: int, *, opens: bool) -> None:
        """Change the balance from outside; an operator may reopen the account."""
        self.upstream.balances[account] = Balance(count, money)
        if opens:
            self.compare(self.ledger.reopen_account(account), self.model.reopen_account, account)

    @rule(
        account=accounts,
        left=st.sampled_from([Balance(1, 0), Balance(0, 100), Balance(0, 150)]),
        new=st.sampled_from([Balance(0, 2_000), Balance(0, 2_000), Balance(3, 0), Balance(3, 2_000)]),
        live=st.booleans(),
    )
    def top_up(self, account: int, left: Balance, new: Balance, *, live: bool) -> None:
        """Exhaust an account whose balance is known, top it up, and notice that by a check or by a submission."""
        self.upstream.reports_current_balance = live
        self.know_balance(account, left)
        self.run_submission(account, usual_plan(KINDS[0]), 1)
        self.upstream.balances[account] = new
        self.run_submission(account, usual_plan(KINDS[0]), 1)

    def know_balance(self, account: int, balance: Balance) -> None:
        """Reopen an account with this balance, and run a submission which shows it."""
        self.write_policies(TenantPolicy())
        self.compare(self.ledger.reopen_account(account), self.model.reopen_account, account)
        self.upstream.balances[account] = balance
        self.run_submission(account, usual_plan(KINDS[0]), 1)

    # Submissions

    @rule(kind=draw.kinds, order=draw.account_orders, after=draw.answer_delays, times=st.sampled_from([1, 1, 3]))
    def submit(self, kind: Kind, order: tuple[int, ...], after: int, times: int) -> None:
        self.advance_clock(after)
        for _ in range(times):
            self.reserve(kind, order)

    @rule(
        key=st.sampled_from(["k1", "k2"]),
        outcome=draw.outcomes | st.just(UNKNOWN),
        late=draw.outcomes,
        pause=st.sampled_from([0, DAY_MS - 1, DAY_MS]),
    )
    def submit_with_key(self, key: str, outcome: ReservationState, late: ReservationState, pause: int) -> None:
        """Submit with an idempotency key, and again before and after the outcomes, also with other content."""
        first, other = Idempotency(key, "c1", "s1"), Idempotency(key, "c2")
        name = self.reserve(KINDS[0], ACCOUNTS, first)
        for idempotency in (first, other):
            self.reserve(KINDS[0], ACCOUNTS, idempotency)
        for result, milliseconds in ((outcome, pause), (late, 0)):
            if name:
                self.settle(name, result)
            self.advance_clock(milliseconds)
            self.reserve(KINDS[1], ACCOUNTS, other)
            self.reserve(KINDS[0], ACCOUNTS, first)
        self.settle(self.next_name(), outcome, idempotency=other)

    @rule(
        window=st.sampled_from(Window),
        tasks=few_or_none,
        money=st.sampled_from([None, None, 0, 99, 100, 250, 300]),
        active=few_or_none,
        kind=draw.kinds,
        order=draw.account_orders,
        outcomes=st.lists(st.sampled_from([None, None, ACCEPTED, UNKNOWN]), min_size=2, max_size=4),
        opens=st.booleans(),
        moves=mostly_false,
    )
    def submit_at_limits(
        self,
        window: Window,
        tasks: int | None,
        money: int | None,
        active: int | None,
        kind: Kind,
        order: tuple[int, ...],
        outcomes: list[ReservationState | None],
        *,
        opens: bool,
        moves: bool,
    ) -> None:
        """Submit up to limits that leave so much; some move to the other account, and some have an outcome.

        With `opens` both accounts can pay.
        """
        for account in ACCOUNTS if opens else ():
            self.change_balance(account, 9, 2_000, opens=True)
        state = self.tenant_state()
        counter = state.windows[window]
        limit = Limit(
            window,
            tasks=None if tasks is None else counter.tasks + counter.tasks_reserved + tasks,
            money_fen=None if money is None else counter.money_fen + counter.money_reserved_fen + money,
        )
        self.write_policies(TenantPolicy((limit,), None if active is None else state.active_tasks + active))
        for outcome in outcomes:
            name = self.reserve(kind, order)
            if name and moves:
                left = self.model.reservations[name].account
                self.change_account(name, left, tuple(account for account in ACCOUNTS if account != left), None)
            if name and outcome:
                self.settle(name, outcome)
        self.write_tenant_policy(TenantPolicy())

    @rule(
        account=accounts,
        kind=draw.kinds,
        uses=st.integers(0, 2),
        money=st.sampled_from([0, 100, 101, 200, 250]),
        price=st.sampled_from([None, 100, 250]),
        mode=st.sampled_from(SpendingMode),
        after=draw.answer_delays,
        balance=st.none() | st.sampled_from([Balance(9, 300), Balance(3, 0), Balance(0, 2_000)]),
        last=st.sampled_from([ACCEPTED, UNKNOWN]),
    )
    def submit_at_floors(
        self,
        account: int,
        kind: Kind,
        uses: int,
        money: int,
        price: int | None,
        mode: SpendingMode,
        after: int,
        balance: Balance | None,
        last: ReservationState,
    ) -> None:
        """Submit up to floors so far below the known balance, then one that may spend money.

        With a `balance` it becomes known first; the last submission may have an unknown outcome.
        """
        if balance:
            self.know_balance(account, balance)
            self.run_submission(account, usual_plan(kind)._replace(outcome=last), 1)
        state = self.model.account_state(account)
        count, fen = state.count.value if state.count else 0, state.money.value if state.money else 0
        floors = AccountPolicy(max(count - uses, 0), max(fen - money, 0), {} if price is None else {kind: price})
        first, second = (floors if account == item else AccountPolicy() for item in ACCOUNTS)
        self.write_policies(TenantPolicy(spending_mode=mode), first, second)
        for _ in range(3):
            self.reserve(kind, (account,))
        self.claim_balance_check(account, count_only=mode is SpendingMode.COUNT_ONLY)
        self.advance_clock(after)
        self.write_tenant_policy(TenantPolicy())
        self.reserve(kind, (account,))
        self.write_policies(TenantPolicy())

    @rule(
        account=accounts,
        plans=draw.plan_sequences,
        after=st.sampled_from([1, 700]),
        quiet=st.sampled_from([None, True, True, False]),
        policy=st.none() | draw.money_limited_policies,
        max_price=st.sampled_from([None, 100]),
    )
    def run_submissions(
        self,
        account: int,
        plans: list[SubmissionPlan],
        after: int,
        quiet: bool | None,
        policy: TenantPolicy | None,
        max_price: int | None,
    ) -> None:
        """Run submissions on one account without overlap, after finishing all others if `quiet` says so."""
        if quiet is not None:
            self.finish_all(succeeds=quiet)
        if policy:
            prices = AccountPolicy(max_price=dict.fromkeys(KINDS, max_price) if max_price else {})
            self.write_policies(policy, prices, prices)
        for plan in plans:
            self.run_submission(account, plan, after)

    @rule(account=accounts, reported=st.permutations([Balance(5, 500), Balance(4, 400), Balance(3, 500)]))
    def overlap_submissions(self, account: int, reported: list[Balance]) -> None:
        """Submit three at once; the responses and the checks overlap, and report balances in any order."""
        self.know_balance(account, Balance(9, 900))
        names = []
        for _ in reported:
            self.advance_clock(1)
            names.append(self.reserve(KINDS[0], (account,)))
        for name, balance in zip(names, reported, strict=True):
            self.advance_clock(1)
            if name:
                self.settle(name, ACCEPTED, balance)
        claimed = []
        for _ in reported:
            self.advance_clock(self.retention.check_interval_ms)
            claimed += self.claim_checks(1)
        for due, balance in zip(reversed(claimed), reported, strict=False):
            self.record_check(due, SUCCEEDED, balance)

    # Outcomes

    @rule(number=draw.numbers, order=draw.account_orders, closes=draw.close_statuses, repeats=st.booleans())
    def move_submission(
        self, number: int, order: tuple[int, ...], closes: AccountStatus | None, *, repeats: bool
    ) -> None:
        name = self.choose_reservation(number, is_reserved) or self.reserve(KINDS[0], order)
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
        name = self.choose_reservation(number, lambda item: is_reserved(item) or item.state is UNKNOWN)
        name = name or self.reserve(KINDS[0], ACCOUNTS)
        self.advance_clock(after)
        if name:
            outcome = REFUSED if closes else outcome
            self.settle(name, outcome, reported, closes, charged=charged, late=late, wrong_account=elsewhere)

    @rule(
        number=draw.numbers,
        outcome=draw.outcomes,
        reported=draw.reported_balances,
        closes=draw.close_statuses,
        idempotency=draw.idempotencies,
        lost=st.booleans(),
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
        """Repeat every operation on a settled or unknown reservation, or on one that was lost, or has not arrived."""
        name = self.choose_reservation(number, lambda item: not is_reserved(item))
        if name is None or lost:
            name = self.next_name()
        self.change_account(name, ACCOUNTS[0], ACCOUNTS, closes)
        self.settle(name, outcome, reported, closes, idempotency)
        self.reserve(Kind.UPSCALE, ACCOUNTS, name=name)

    @rule(
        number=draw.numbers,
        tenant=st.sampled_from([TENANT] * 5 + [9]),
        reason=st.sampled_from(["", "它失败了", "a mistake"]),
    )
    def refund_settled(self, number: int, tenant: int, reason: str) -> None:
        self.refund(tenant, self.choose_reservation(number, lambda item: not is_reserved(item)) or "never", reason)

    # Checks

    @rule(
        most=st.integers(0, 3),
        number=draw.numbers,
        answered=draw.answers,
        reported=draw.reported_balances,
        after=draw.answer_delays,
        touches=st.booleans(),
        awaits=st.booleans(),
        together=st.booleans(),
        releases=st.booleans(),
    )
    def check_task(
        self,
        most: int,
        number: int,
        answered: CheckOutcome,
        reported: Balance | None,
        after: int,
        *,
        touches: bool,
        awaits: bool = False,
        together: bool = False,
        releases: bool = False,
    ) -> None:
        """Claim due checks, and record one in progress, or several; a task may be read or awaited at that time.

        Or the claims are released, as if their process had ended.
        """
        if most:
            self.claim_checks(most)
        self.advance_clock(after)
        name = self.choose_reservation(number, lambda _: True)
        if touches and name:
            self.touch_task(name, is_awaited=awaits)
        if not self.claimed_checks:
            return
        if releases and not touches:
            self.release_checks(self.claimed_checks)
        elif answered is CheckOutcome.RUNNING and together:
            self.record_running(list({due.task.reservation: due for due in self.claimed_checks}.values()))
        else:
            self.record_check(self.claimed_checks[number % len(self.claimed_checks)], answered, reported)

    @rule(
        account=accounts,
        count_only=st.booleans(),
        pause=st.sampled_from([0, PROBE_INTERVAL_MS]),
        number=draw.numbers,
        reported=draw.reported_balances,
        after=draw.answer_delays,
    )
    def check_balance(
        self, account: int, pause: int, number: int, reported: Balance | None, after: int, *, count_only: bool
    ) -> None:
        """Claim a balance check if it is due, and record one in progress."""
        self.advance_clock(pause)
        self.claim_balance_check(account, count_only=count_only)
        self.advance_clock(after)
        if number < len(self.balance_checks):
            self.record_balance_check(self.balance_checks[number], reported)

    # Time

    @rule(milliseconds=draw.clock_steps, most=st.integers(0, 3))
    def pass_time(self, milliseconds: int, most: int) -> None:
        """Advance the clock, and expire leases."""
        self.advance_clock(milliseconds)
        if most:
            self.settle_expired(most)

    @rule(
        milliseconds=st.sampled_from([0, 1, 700, 1_200_000, 90_000_000]),
        forth=st.sampled_from([0, 0, 500, 1_200_000]),
        resets=st.sampled_from([None, None, (TENANT,), ()]),
    )
    def step_clock_back(self, milliseconds: int, forth: int, resets: tuple[int, ...] | None) -> None:
        """Step the server's clock back, with calls before and after; an operator may reset the ledger's clock."""
        self.touch_task("nothing")
        self.advance_clock(-milliseconds)
        self.touch_task("nothing")
        self.advance_clock(forth)
        if resets is not None:
            self.compare(self.ledger.reset_clock(resets, ACCOUNTS), self.model.reset_clock, resets, ACCOUNTS)

    # Deliveries

    @rule(target=deliveries_in_progress, most=st.integers(1, 12), succeeds=st.booleans())
    def finish_tasks(self, most: int, *, succeeds: bool) -> Any:
        """Finish six tasks and claim their deliveries, since few random sequences get that far."""
        for _ in range(6):
            if name := self.reserve(KINDS[0], ACCOUNTS):
                self.settle(name, ACCEPTED, Balance())
        self.advance_clock(self.retention.check_interval_ms)
        for due in self.claim_checks(9):
            self.record_check(due, SUCCEEDED if succeeds else FAILED)
        return self._claim_deliveries(most)

    @rule(
        target=deliveries_in_progress,
        most=st.integers(1, 12),
        pause=st.sampled_from([0, 4_000, LEASE_MS - 1, LEASE_MS, FAILING_MS]),
    )
    def claim_deliveries(self, most: int, pause: int) -> Any:
        self.advance_clock(pause)
        return self._claim_deliveries(most)

    def _claim_deliveries(self, most: int) -> Any:
        return multiple(*(self.compare(self.deliveries.claim(most), self.model.claim_deliveries, most) or ()))

    @rule(
        percent=st.sampled_from([80, 95]),
        window_start=st.sampled_from([0, 60_000, 120_000]),
        limit=st.sampled_from([10, 20]),
        url=st.sampled_from(list(filter(None, WEBHOOKS))),
    )
    def reach_threshold(self, percent: int, window_start: int, limit: int, url: str) -> None:
        window, counts = Window.MINUTE, {"limit": limit, "used": limit, "reserved": 0}
        threshold = Threshold("minute-tasks", "tasks", window, window_start, window_start + 60_000, percent, **counts)
        event = threshold.event_name(TENANT), TENANT, url, threshold, b'{"type":"quota.threshold"}'
        self.compare(self.deliveries.queue_threshold(*event), self.model.queue_threshold, *event)

    @rule(claimed=deliveries_in_progress, result=st.none() | draw.delivery_results)
    def record_delivery(self, claimed: ClaimedDelivery, result: DeliveryResult | None) -> None:
        """Record a result; without one, an operator sends it again."""
        name = claimed.delivery.id
        if result:
            attempt = self.deliveries.record_attempt(claimed, result)
            self.compare(attempt, self.model.record_delivery, claimed, result)
        else:
            self.compare(self.deliveries.redeliver(name), self.model.redeliver, name)


def test_scripts_and_model(valkey: Valkey) -> None:
    run_state_machine_as_test(
        cast("type[RuleBasedStateMachine]", lambda: LedgerMachine(valkey.url)),
        settings=settings(
            max_examples=max(settings().max_examples, MIN_EXAMPLES), suppress_health_check=list(HealthCheck)
        ),
    )


@contextmanager
def run_machine(valkey: Valkey) -> Iterator[LedgerMachine]:
    machine = LedgerMachine(valkey.url)
    try:
        yield machine
        machine.stored_data_matches()
    finally:
        machine.teardown()


# Sequences that random runs reach too rarely

ANSWERS = st.tuples(
    st.sampled_from([RUNNING, NOT_FOUND, NOT_FOUND, INVALID, INVALID, NO_RESPONSE]), st.sampled_from([1, 50_000])
)


@given(answers=st.lists(ANSWERS, min_size=3, max_size=10))
@example(answers=[(INVALID, 50_000)] * 6)
@example(answers=[(NOT_FOUND, 50_000), (INVALID, 50_000)] * 3)
@example(answers=[(NOT_FOUND, 50_000)] * 2 + [(NO_RESPONSE, 1), (RUNNING, 1)] + [(NOT_FOUND, 50_000)] * 2)
@example(answers=[(INVALID, 50_000)] * 4 + [(NO_RESPONSE, 50_000), (RUNNING, 1)] + [(INVALID, 50_000)] * 2)
@example(answers=[(INVALID, 50_000)] * 4 + [(NO_RESPONSE, 50_000)] * 2 + [(INVALID, 50_000)] * 2)
def test_unanswered_checks(valkey: Valkey, answers: list[tuple[CheckOutcome, int]]) -> None:
    """For any sequence of answers, a task ends at the same check with the same error on both sides."""
    with run_machine(valkey) as machine:
        name = machine.reserve(Kind.UPSCALE, ACCOUNTS)
        assert name
        machine.settle(name, ACCEPTED, Balance())
        machine.advance_clock(machine.retention.check_interval_ms)
        (due,) = machine.model.claim_checks(1)
        for answer, milliseconds in answers:
            machine.advance_clock(milliseconds)
            machine.record_check(due, answer)


@given(window=st.sampled_from(Window), remaining=st.integers(100, 250), price=st.integers(50, 400))
@example(window=Window.TOTAL, remaining=100, price=101)
@example(window=Window.MONTH, remaining=250, price=250)
def test_overrun(valkey: Valkey, window: Window, remaining: int, price: int) -> None:
    """A risen price is charged in full; the part beyond the limit counts as overrun."""
    with run_machine(valkey) as machine:
        machine.set_upstream(late=True, now=True, count=0, money=2_000)
        machine.advance_clock(3_600_000)
        for _ in range(2):  # the second shows the price
            machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0]), 1)
        spent = machine.tenant_state().windows[window].money_fen
        machine.write_tenant_policy(TenantPolicy((Limit(window, money_fen=spent + remaining),)))
        machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0])._replace(price_fen=price), 1)
        counted = machine.tenant_state().windows[window]
        assert machine.upstream.balances[ACCOUNTS[0]] == Balance(0, 2_000 - 200 - price)
        assert (counted.money_fen, counted.overrun_fen) == (spent + price, max(price - remaining, 0))


def test_overrun_of_each_task_is_at_most_its_cost(valkey: Valkey) -> None:
    with run_machine(valkey) as machine:
        machine.set_upstream(late=False, now=True, count=0, money=2_000)
        for _ in range(2):
            machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0]), 1)
        for name in [machine.reserve(KINDS[0], ACCOUNTS[:1]) for _ in range(2)]:
            assert name
            machine.settle(name, ACCEPTED)
        spent = machine.tenant_state().windows[Window.TOTAL].money_fen
        machine.write_tenant_policy(TenantPolicy((Limit(Window.TOTAL, money_fen=spent + 50),)))
        machine.advance_clock(machine.retention.check_interval_ms)
        for due in machine.claim_checks(9):
            machine.record_check(due, SUCCEEDED)
        counter = machine.tenant_state().windows[Window.TOTAL]
        assert counter.overrun_fen == counter.money_fen - spent - 50 == 150


def test_usage_counts_what_passes_several_limits_once(valkey: Valkey) -> None:
    with run_machine(valkey) as machine:
        machine.set_upstream(late=False, now=True, count=0, money=2_000)
        for _ in range(2):
            machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0]), 1)
        name = machine.reserve(KINDS[0], ACCOUNTS[:1])
        assert name
        machine.settle(name, ACCEPTED)
        spent = machine.tenant_state().windows[Window.TOTAL].money_fen
        limits = Limit(Window.MONTH, money_fen=spent + 60), Limit(Window.TOTAL, money_fen=spent + 30)
        machine.write_tenant_policy(TenantPolicy(limits))
        machine.advance_clock(machine.retention.check_interval_ms)
        for due in machine.claim_checks(9):
            machine.record_check(due, SUCCEEDED)
        windows = machine.tenant_state().windows
        assert [windows[limit.window].overrun_fen for limit in limits] == [40, 70]
        assert machine.model.reservations[name].overrun_fen == 70
        machine.refund(TENANT, name, "")


def test_sums_of_the_usage_are_read_from_it_if_they_are_missing(valkey: Valkey) -> None:
    """As after an upgrade: with the next change of a kind, its uses and money of the day, the month and all days."""
    with run_machine(valkey) as machine:
        machine.set_upstream(late=False, now=True, count=4, money=2_000)
        for days in (0, 1, 40, 1, 0):
            machine.advance_clock(days * DAY_MS)
            for kind in KINDS[:2]:
                machine.run_submission(ACCOUNTS[0], usual_plan(kind), 1)
        fields = [f"spent {kind}" for kind in Kind]
        assert machine.run(machine.client.hdel(machine.keys.tenant(TENANT), *fields)) == 2
        for number in range(2):  # the newest of each kind
            name = machine.choose_reservation(number, lambda _: True)
            assert name
            machine.refund(TENANT, name, "")
        machine.stored_data_matches()
        sums = [machine.model.spent(TENANT, window) for window in (Window.DAY, Window.MONTH, Window.TOTAL)]
        assert len({str(item) for item in sums}) == 3


@pytest.mark.parametrize(
    "plan",
    [
        usual_plan(KINDS[0])._replace(price_fen=250),
        usual_plan(KINDS[0])._replace(outcome=UNKNOWN, later_outcome=ACCEPTED, is_refunded=True, answered=RUNNING),
    ],
    ids=["above the maximum", "refunded before a late acceptance"],
)
def test_configured_price(valkey: Valkey, plan: SubmissionPlan) -> None:
    with run_machine(valkey) as machine:
        prices = AccountPolicy(max_price=dict.fromkeys(KINDS, 100))
        machine.set_upstream(late=False, now=True, count=0, money=2_000)
        machine.write_policies(TenantPolicy((Limit(Window.DAY, money_fen=1_000),)), prices, prices)
        machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0]), 1)
        machine.run_submission(ACCOUNTS[0], plan, 1)


def test_reset_after_steps_back_in_a_row(valkey: Valkey) -> None:
    """A reset also moves an unknown submission made on a day that is in the future by now."""
    with run_machine(valkey) as machine:
        machine.set_upstream(late=False, now=False, count=9, money=2_000)
        machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0])._replace(outcome=UNKNOWN), 1)
        for _ in range(2):
            machine.step_clock_back(2 * DAY_MS, 0, (TENANT,))
            machine.stored_data_matches()


@pytest.mark.parametrize("reported", [None, Balance()], ids=["with a balance", "without"])
def test_acceptance_of_a_submission_that_a_reset_did_not_move(valkey: Valkey, reported: Balance | None) -> None:
    """A late outcome of a submission that the balance includes already leaves no charge too few.

    The reset names no tenant, so the outcome still seems to be newer than the balance.
    """
    with run_machine(valkey) as machine:
        machine.set_upstream(late=True, now=True, count=3, money=0)
        machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0]), 1)
        name = machine.reserve(KINDS[0], ACCOUNTS[:1])
        assert name
        machine.settle(name, UNKNOWN, Balance(), charged=False)
        machine.advance_clock(LATE_CHARGE_MS)
        machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0]), 1)
        assert machine.model.accounts[ACCOUNTS[0]].untracked_charges == 0
        machine.step_clock_back(DAY_MS, 0, ())
        machine.settle(name, ACCEPTED, reported)
        machine.stored_data_matches()
        machine.account_counters_add_up()
        assert machine.model.accounts[ACCOUNTS[0]].unaccounted_charges == 1
        assert machine.reserve(KINDS[0], ACCOUNTS[:1]) is None, "the account's only use is that of the open task"
