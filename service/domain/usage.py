"""What a tenant's submissions of one day came to.

A submission counts in the day of its reservation, in UTC, as in the windows: what a day charged is what the window of
that day counted. Money is in fen.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum

import msgspec
from msgspec import Struct, field

from service.domain.reservation import Refund, Reservation, ReservationState
from service.domain.task import Basis, Kind
from service.domain.tenancy import Window


class Measure(StrEnum):
    """What is counted of each kind: submissions by outcome, then what they took by the basis it is known on."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    UNKNOWN = "unknown"
    REFUSED = "refused"
    NOT_SENT = "not-sent"
    OBSERVED_COUNT = "observed-count"
    OBSERVED_MONEY = "observed-money"
    ESTIMATED_COUNT = "estimated-count"
    ESTIMATED_MONEY = "estimated-money"
    UNKNOWN_COST = "unknown-cost"
    """Ended tasks of which nobody knows what they took."""
    UNKNOWN_MONEY = "unknown-money"
    """What submissions of unknown outcome are charged for."""
    REFUNDED = "refunded"
    REFUNDED_COUNT = "refunded-count"
    REFUNDED_MONEY = "refunded-money"


Tally = Counter[Measure]

_COSTS = {
    Basis.OBSERVED: (Measure.OBSERVED_COUNT, Measure.OBSERVED_MONEY),
    Basis.ESTIMATED: (Measure.ESTIMATED_COUNT, Measure.ESTIMATED_MONEY),
}


class DayUsage(Struct):
    """One day of one tenant: the tally of each kind, and by reservation those that are unknown or were refunded."""

    tallies: dict[Kind, Tally] = field(default_factory=dict)
    unknown: dict[str, Kind] = field(default_factory=dict)
    refunds: dict[str, tuple[Kind, Refund]] = field(default_factory=dict)


def book(day: DayUsage, name: str, reservation: Reservation, sign: int) -> None:
    """Put in what the reservation `name` counts for, or (with a sign of -1) take it out."""
    tally = day.tallies.setdefault(reservation.kind, Tally())
    for measure, change in _tally(reservation).items():
        tally[measure] += sign * change
    if reservation.state is ReservationState.UNKNOWN:
        day.unknown[name] = reservation.kind
        if sign < 0:
            del day.unknown[name]
    if reservation.refund:
        day.refunds[name] = reservation.kind, msgspec.structs.replace(reservation.refund)
        if sign < 0:
            del day.refunds[name]


def _tally(reservation: Reservation) -> Tally:
    """What a reservation counts for, which follows from it alone."""
    tally = Tally()
    match reservation.state:
        case ReservationState.RESERVED:
            pass
        case ReservationState.REFUSED:
            tally[Measure.REFUSED] = 1
        case ReservationState.NOT_SENT:
            tally[Measure.NOT_SENT] = 1
        case ReservationState.UNKNOWN:
            tally[Measure.UNKNOWN] = 1
            tally[Measure.UNKNOWN_MONEY] = reservation.holds.get(Window.DAY, 0)
        case ReservationState.ACCEPTED:
            cost = reservation.cost
            if cost is None:
                tally[Measure.RUNNING] = 1
            else:
                tally[Measure.SUCCEEDED if reservation.succeeded else Measure.FAILED] = 1
            if cost and cost.basis in _COSTS:
                uses, money = _COSTS[cost.basis]
                tally[uses], tally[money] = cost.count, cost.money
            elif cost:
                tally[Measure.UNKNOWN_COST] = 1
    if reservation.refund:
        tally[Measure.REFUNDED] = 1
        tally[Measure.REFUNDED_COUNT] = reservation.refund.count
        tally[Measure.REFUNDED_MONEY] = reservation.refund.money
    return tally


def charged_tasks(tally: Tally) -> int:
    """How many submissions the tenant's windows count."""
    return (
        tally[Measure.RUNNING]
        + tally[Measure.SUCCEEDED]
        + tally[Measure.FAILED]
        + tally[Measure.UNKNOWN]
        - tally[Measure.REFUNDED]
    )


def charged_money(tally: Tally) -> int:
    """How much money the tenant's windows count."""
    return (
        tally[Measure.OBSERVED_MONEY]
        + tally[Measure.ESTIMATED_MONEY]
        + tally[Measure.UNKNOWN_MONEY]
        - tally[Measure.REFUNDED_MONEY]
    )
