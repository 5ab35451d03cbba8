"""Hypothesis strategies for limits, balances, outcomes, checks and deliveries, and a simulated upstream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from hypothesis import strategies as st

from service.domain.ledger import AccountStatus, Balance, Idempotency, ReservationState
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, Limit, SpendingMode, TenantPolicy, Window
from service.domain.webhooks import DeliveryState
from service.usecases.ports import CheckOutcome, DeliveryResult

KINDS = (Kind.UPSCALE, Kind.SEAMLESS)

numbers = st.integers(0, 7)
"""The index of the item to use, counted from the newest."""

idempotencies = st.none() | st.builds(
    Idempotency,
    st.sampled_from(["k1", "k2", "k3"]),
    st.sampled_from(["c1", "c1", "c1", "c2"]),
    st.sampled_from(["", "s1", "s2"]),
)
limits = st.builds(
    Limit,
    st.sampled_from(Window),
    tasks=st.sampled_from([None, None, 0, 1, 2, 3, 8, 30]),
    money_fen=st.sampled_from([None, 0, 99, 300, 700, 2_000]),
)
tenant_policies = st.builds(
    TenantPolicy,
    limits=st.lists(limits, max_size=2, unique_by=lambda item: item.window).map(tuple),
    max_active=st.sampled_from([None, None, None, 0, 1, 2]),
    spending_mode=st.sampled_from(SpendingMode),
)
money_limited_policies = st.builds(Limit, st.sampled_from(Window), money_fen=st.sampled_from([300, 700])).map(
    lambda limit: TenantPolicy(limits=(limit,))
)
account_policies = st.builds(
    AccountPolicy,
    floor_count=st.sampled_from([0, 0, 0, 1, 2]),
    floor_money_fen=st.sampled_from([0, 0, 0, 100]),
    max_price=st.dictionaries(st.sampled_from(KINDS), st.sampled_from([0, 100, 250]), max_size=2),
)
counts = st.sampled_from([9, 3, 1, 0, 0])
amounts = st.sampled_from([2_000, 2_000, 2_000, 300, 100, 50, 0])
prices = st.sampled_from([100, 100, 250])
balances = st.builds(Balance, count=st.none() | counts, money_fen=st.none() | amounts)
reported_balances: st.SearchStrategy[Balance | None] = st.integers(0, 11).flatmap(
    lambda number: st.none() if number < 10 else st.just(Balance()) if number == 10 else balances
)
"""The balance that an answer reports; mostly None, which stands for the true one."""

outcomes = st.sampled_from([item for item in ReservationState if item is not ReservationState.RESERVED])
likely_outcomes = st.sampled_from(
    [
        *[ReservationState.ACCEPTED] * 8,
        *[ReservationState.UNKNOWN] * 3,
        ReservationState.REFUSED,
        ReservationState.NOT_SENT,
    ]
)
close_statuses = st.sampled_from([None, None, None, None, AccountStatus.EXHAUSTED, AccountStatus.INVALID])
account_orders = st.sampled_from([(2,), (3,), (2, 3), (2, 3), (3, 2), ()])
answers = st.sampled_from([CheckOutcome.SUCCEEDED] * 6 + [CheckOutcome.FAILED] * 2 + list(CheckOutcome))

answer_delays = st.sampled_from([0, 1, 1, 700])
"""The duration of an answer, in milliseconds."""
MAX_CLOCK_STEP_MS = 31 * 86_400_000
clock_steps = st.sampled_from(
    [1, 999, 2_500, 30_000, 60_000, 180_000, 600_000, 600_000, 3_600_000, 86_400_000, MAX_CLOCK_STEP_MS]
)


class SubmissionPlan(NamedTuple):
    """A submission after a pause, at a price, with its outcome, its end and the balances reported.

    For an unknown outcome, `is_charged` is whether the vendor charged it, and `later_outcome` the final outcome,
    after a refund if `is_refunded`.
    """

    pause_ms: int
    price_fen: int
    kind: Kind
    outcome: ReservationState
    is_charged: bool
    balance_at_submit: Balance | None
    answered: CheckOutcome
    balance_at_end: Balance | None
    later_outcome: ReservationState | None = None
    is_refunded: bool = False


def usual_plan(kind: Kind) -> SubmissionPlan:
    """Return a plan that succeeds and reports true balances."""
    return SubmissionPlan(1, 100, kind, ReservationState.ACCEPTED, True, None, CheckOutcome.SUCCEEDED, None)


def is_truthful(plan: SubmissionPlan) -> bool:
    """Return whether the gateway is told the true outcome and balances, in time if at all."""
    balances = {plan.balance_at_submit, plan.balance_at_end} <= {None, Balance()}
    return (
        balances
        and plan.later_outcome is None
        and plan.outcome in {ReservationState.ACCEPTED, ReservationState.UNKNOWN}
    )


kinds = st.sampled_from(KINDS)
pauses = st.sampled_from([1, 60_000, 600_000])
later_outcomes = st.none() | st.just(ReservationState.ACCEPTED) | outcomes
plans = st.builds(
    SubmissionPlan,
    pauses,
    prices,
    kinds,
    likely_outcomes,
    st.booleans(),
    reported_balances,
    answers,
    reported_balances,
    later_outcomes,
    st.booleans(),
)
usual_plans = st.builds(usual_plan, kinds)
unknown_plans = usual_plans.flatmap(
    lambda item: st.builds(
        item._replace,
        outcome=st.just(ReservationState.UNKNOWN),
        is_charged=st.booleans(),
        later_outcome=later_outcomes,
        is_refunded=st.booleans(),
        pause_ms=pauses,
    )
)
silent_plans = usual_plans.map(lambda item: item._replace(balance_at_submit=Balance()))
inference_sequences = st.tuples(usual_plans, usual_plans, unknown_plans, plans | usual_plans | silent_plans).map(list)
plan_sequences = st.lists(plans, min_size=1, max_size=6) | inference_sequences
"""Submissions that do not overlap; some of them start a charge inference and may resolve it."""

WEBHOOKS = (
    None,
    "http://one.test/ended?for=17",
    "http://one.test:81/",
    "https://one.test:8443/x",
    "http://[fd00::1]/x",
    "http://10.0.0.1:80/x",
)
delivery_results = st.one_of(
    st.just(DeliveryResult(state=DeliveryState.DELIVERED, status=204)),
    st.builds(
        DeliveryResult,
        state=st.just(DeliveryState.PENDING),
        retry_delay_ms=st.sampled_from([4_000, 30_000, 28_800_000]),
        status=st.none() | st.just(500),
        error=st.just("It failed."),
        response_excerpt=st.none() | st.just("失败"),
    ),
    st.builds(
        DeliveryResult,
        state=st.sampled_from([DeliveryState.FAILED, DeliveryState.DISABLED]),
        attempted=st.booleans(),
        error=st.just("It is over."),
    ),
)


@dataclass
class SimulatedUpstream:
    """Charges at submit, or at the end if `charges_at_end`.

    A check reports the current balance if `reports_current_balance`, otherwise that at the task's end.
    `charged_tasks` and `final_balances` are keyed by task name.
    """

    charges_at_end: bool
    reports_current_balance: bool
    prices: dict[Kind, int]
    balances: dict[int, Balance]
    charged_tasks: set[str] = field(default_factory=set)
    final_balances: dict[str, Balance] = field(default_factory=dict)

    def can_pay(self, account: int, kind: Kind) -> bool:
        balance = self.balances[account]
        return bool(balance.count) or (balance.money_fen or 0) >= self.prices[kind]

    def submit(self, name: str, account: int, kind: Kind) -> None:
        if not self.charges_at_end:
            self._charge(name, account, kind)

    def finish_task(self, name: str, account: int, kind: Kind, *, succeeds: bool) -> Balance:
        """End a task, or check one that has ended. A failed task charges nothing and reports nothing."""
        if not succeeds:
            return Balance()
        if self.charges_at_end:
            self._charge(name, account, kind)
        reported = self.final_balances.setdefault(name, self.balances[account])
        return self.balances[account] if self.reports_current_balance else reported

    def _charge(self, name: str, account: int, kind: Kind) -> None:
        """Charge a prepaid use, otherwise the price, once."""
        balance, price = self.balances[account], self.prices[kind]
        count, money = balance.count or 0, balance.money_fen or 0
        if name in self.charged_tasks:
            return
        self.charged_tasks.add(name)
        if count:
            self.balances[account] = Balance(count - 1, money)
        else:
            self.balances[account] = Balance(0, max(money - price, 0))
