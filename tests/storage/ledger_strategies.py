"""What may be asked of a ledger: the limits, figures, outcomes and checks that its property tests draw from."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

from service.domain.ledger import Figures, Idempotency, ReservationState, Status
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, Limit, Purse, TenantPolicy, Window
from service.usecases.ports import Answered

KINDS = (Kind.UPSCALE, Kind.SEAMLESS)

numbers = st.integers(0, 7)
"""Which of the things in question is meant, counted from the newest."""

idempotencies = st.none() | st.builds(
    Idempotency, st.sampled_from(["k1", "k2", "k3"]), st.sampled_from(["c1", "c1", "c1", "c2"])
)
limits = st.builds(
    Limit,
    st.sampled_from(Window),
    tasks=st.sampled_from([None, None, 0, 1, 2, 3, 8, 30]),
    money=st.sampled_from([None, 0, 99, 300, 700, 2_000]),
)
unlimited = st.builds(TenantPolicy, purse=st.sampled_from(Purse))
limited = st.builds(
    TenantPolicy,
    limits=st.lists(limits, min_size=1, max_size=2, unique_by=lambda each: each.window).map(tuple),
    max_active=st.sampled_from([None, None, None, 0, 1, 2]),
    purse=st.sampled_from(Purse),
)
spenders = st.builds(Limit, st.sampled_from(Window), money=st.sampled_from([300, 700])).map(
    lambda limit: TenantPolicy(limits=(limit,))
)
tenant_policies = unlimited | limited
account_policies = st.builds(
    AccountPolicy,
    floor_count=st.sampled_from([0, 0, 0, 1, 2]),
    floor_money=st.sampled_from([0, 0, 0, 100]),
    max_price=st.dictionaries(st.sampled_from(KINDS), st.sampled_from([0, 100, 250]), max_size=2),
)
counts = st.sampled_from([9, 3, 1, 0, 0])
moneys = st.sampled_from([2_000, 2_000, 2_000, 300, 100, 50, 0])
prices = st.sampled_from([100, 100, 250])
figures = st.builds(Figures, count=st.none() | counts, money=st.none() | moneys)
tellings: st.SearchStrategy[Figures | None] = st.integers(0, 11).flatmap(
    lambda number: st.none() if number < 10 else st.just(Figures()) if number == 10 else figures
)
"""What an answer tells of the balance: mostly (None) what it is."""

outcomes = st.sampled_from([each for each in ReservationState if each is not ReservationState.RESERVED])
likely_outcomes = st.sampled_from(
    [
        *[ReservationState.ACCEPTED] * 8,
        *[ReservationState.UNKNOWN] * 3,
        ReservationState.REFUSED,
        ReservationState.NOT_SENT,
    ]
)
closings = st.sampled_from([None, None, None, None, Status.EXHAUSTED, Status.INVALID])
orders = st.sampled_from([(2,), (3,), (2, 3), (2, 3), (3, 2), ()])
answers = st.sampled_from([Answered.SUCCEEDED] * 6 + [Answered.FAILED] * 2 + list(Answered))

ticks = st.sampled_from([0, 1, 1, 700])
"""How long an answer takes, in milliseconds."""
steps = st.sampled_from(
    [1, 999, 2_500, 30_000, 60_000, 180_000, 600_000, 600_000, 3_600_000, 86_400_000, 31 * 86_400_000]
)


class Whole(NamedTuple):
    """A submission after a pause, at a price: its outcome, its end, and what is told.

    Of an unknown outcome `charged` says whether it was taken, and `found` what it turns out to be, after it was
    refunded if it is `given_back`.
    """

    pause: int
    price: int
    kind: Kind
    outcome: ReservationState
    charged: bool
    at_submit: Figures | None
    answered: Answered
    at_end: Figures | None
    found: ReservationState | None = None
    given_back: bool = False


def usual(kind: Kind) -> Whole:
    """A submission that succeeds, of which all is told as it is."""
    return Whole(1, 100, kind, ReservationState.ACCEPTED, True, None, Answered.SUCCEEDED, None)


kinds = st.sampled_from(KINDS)
pauses = st.sampled_from([1, 60_000, 600_000])
finds = st.none() | outcomes
wholes = st.builds(
    Whole, pauses, prices, kinds, likely_outcomes, st.booleans(), tellings, answers, tellings, finds, st.booleans()
)
usuals = st.builds(usual, kinds)
unknowns = usuals.flatmap(
    lambda each: st.builds(
        each._replace,
        outcome=st.just(ReservationState.UNKNOWN),
        charged=st.booleans(),
        found=finds,
        given_back=st.booleans(),
        pause=pauses,
    )
)
doubts = st.tuples(usuals, usuals, unknowns, wholes | usuals).map(list)
series = st.lists(wholes, min_size=1, max_size=6) | doubts
"""Submissions that do not overlap; among them such as raise a doubt, and may settle it."""
