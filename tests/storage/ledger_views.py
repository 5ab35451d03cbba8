"""Comparable forms of what a ledger stores, and predicates on reservations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from service.domain.ledger import Balance, DayUsage, Reservation, ReservationState, Tally, TenantState
from service.domain.tasks import Task, TaskError
from service.domain.tenants import Window
from tests.model import ledger_model

PROVISIONAL = frozenset({ReservationState.RESERVED, ReservationState.UNKNOWN})
"""The outcomes that can still change."""


def normalize_task(task: Task | None) -> Any:
    """Return a task with comparable raw JSON, and without the detail of a timeout error."""
    if task is None:
        return None
    if task.error and task.error.code in {"task-lost", "result-unusable"}:
        task = msgspec.structs.replace(task, error=TaskError(task.error.code, ""))
    return msgspec.to_builtins(
        msgspec.structs.replace(task, options=bytes(task.options), metadata=bytes(task.metadata))
    )


def roll_state(state: TenantState, now: int) -> TenantState:
    """Return a copy of a tenant's state with its windows at `now`; neither side stores that before it must."""
    state = copy.deepcopy(state)
    ledger_model.roll_windows(state, now)
    return state


def normalize_reservation(result: Any) -> Any:
    """Drop an empty balance after a reservation, also within an answer."""
    if isinstance(result, tuple):
        return tuple(map(normalize_reservation, result))
    if not isinstance(result, Reservation) or result.balance_after != Balance():
        return result
    return msgspec.structs.replace(result, balance_after=None)


def normalize_day(day: DayUsage) -> Any:
    """Drop the zero counters of a day's usage."""
    tallies = {kind: {item: number for item, number in tally.items() if number} for kind, tally in day.tallies.items()}
    return {kind: tally for kind, tally in tallies.items() if tally}, day.unknown, day.refunds


def sum_charges(charged: Callable[[Tally], int], days: Iterable[DayUsage]) -> int:
    """Sum the charges of some days over all kinds."""
    return sum(charged(tally) for day in days for tally in day.tallies.values())


def is_reserved(reservation: Reservation) -> bool:
    return reservation.state is ReservationState.RESERVED


def is_provisional(reservation: Reservation) -> bool:
    return reservation.state in PROVISIONAL


def is_settled(reservation: Reservation) -> bool:
    """Return whether it has an outcome, final or not."""
    return not is_reserved(reservation)


def is_open(reservation: Reservation) -> bool:
    """Return whether it counts as an active task."""
    running = reservation.state is ReservationState.ACCEPTED and reservation.cost is None
    return running or is_reserved(reservation)


def is_charged(reservation: Reservation) -> bool:
    return reservation.state in {ReservationState.ACCEPTED, ReservationState.UNKNOWN}


def charge_in_window(reservation: Reservation, window: Window) -> int:
    """Return the money it counts for in a window, used or held."""
    return reservation.cost.money_fen if reservation.cost else reservation.money_holds.get(window, 0)
