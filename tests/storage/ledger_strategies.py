"""Hypothesis strategies for limits, balances, outcomes and checks."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

from service.domain.ledger import AccountStatus, Balance, Idempotency, ReservationState
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, Limit, SpendingMode, TenantPolicy, Window
from service.usecases.ports import CheckOutcome

KINDS = (Kind.UPSCALE, Kind.SEAMLESS)

numbers = st.integers(0, 7)
"""The index of the item to use, counted from the newest."""

idempotencies = st.none() | st.builds(
    Idempotency, st.sampled_from(["k1", "k2", "k3"]), st.sampled_from(["c1", "c1", "c1", "c2"])
)
limits = st.builds(
    Limit,
    st.sampled_from(Window),
    tasks=st.sampled_from([None, None, 0, 1, 2, 3, 8, 30]),
    money_fen=st.sampled_from([None, 0, 99, 300, 700, 2_000]),
)
unlimited_policies = st.builds(TenantPolicy, spending_mode=st.sampled_from(SpendingMode))
limited_policies = st.builds(
    TenantPolicy,
    limits=st.lists(limits, min_size=1, max_size=2, unique_by=lambda item: item.window).map(tuple),
    max_active=st.sampled_from([None, None, None, 0, 1, 2]),
    spending_mode=st.sampled_from(SpendingMode),
)
money_limited_policies = st.builds(Limit, st.sampled_from(Window), money_fen=st.sampled_from([300, 700])).map(
    lambda limit: TenantPolicy(limits=(limit,))
)
tenant_policies = unlimited_policies | limited_policies
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
clock_steps = st.sampled_from(
    [1, 999, 2_500, 30_000, 60_000, 180_000, 600_000, 600_000, 3_600_000, 86_400_000, 31 * 86_400_000]
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


kinds = st.sampled_from(KINDS)
pauses = st.sampled_from([1, 60_000, 600_000])
later_outcomes = st.none() | outcomes
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
inference_sequences = st.tuples(usual_plans, usual_plans, unknown_plans, plans | usual_plans).map(list)
plan_sequences = st.lists(plans, min_size=1, max_size=6) | inference_sequences
"""Submissions that do not overlap; some of them start a charge inference and may resolve it."""
