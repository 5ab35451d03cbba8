"""What a ledger holds in a form that can be compared, and what its reservations stand for."""

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
"""The outcomes that another can follow."""


def normalize_task(task: Task | None) -> Any:
    """A task whose raw JSON can be compared, without what a patience that ran out says of it."""
    if task is None:
        return None
    if task.error and task.error.code in {"task-lost", "result-unusable"}:
        task = msgspec.structs.replace(task, error=TaskError(task.error.code, ""))
    return msgspec.to_builtins(
        msgspec.structs.replace(task, options=bytes(task.options), metadata=bytes(task.metadata))
    )


def roll_state(state: TenantState, now: int) -> TenantState:
    """A tenant's state with its windows as they are at a time, which neither side writes down before it has to."""
    state = copy.deepcopy(state)
    ledger_model.roll_windows(state, now)
    return state


def normalize_reservation(found: Any) -> Any:
    """A reservation, alone or in an answer, without what stands for nothing."""
    if isinstance(found, tuple):
        return tuple(map(normalize_reservation, found))
    if not isinstance(found, Reservation) or found.balance_after != Balance():
        return found
    return msgspec.structs.replace(found, balance_after=None)


def normalize_day(day: DayUsage) -> Any:
    """A day's usage without what counts nothing."""
    tallies = {kind: {each: number for each, number in tally.items() if number} for kind, tally in day.tallies.items()}
    return {kind: tally for kind, tally in tallies.items() if tally}, day.unknown, day.refunds


def sum_charges(charged: Callable[[Tally], int], days: Iterable[DayUsage]) -> int:
    """What some days come to, over all kinds."""
    return sum(charged(tally) for day in days for tally in day.tallies.values())


def is_reserved(reservation: Reservation) -> bool:
    """Whether it has no outcome yet."""
    return reservation.state is ReservationState.RESERVED


def is_provisional(reservation: Reservation) -> bool:
    """Whether an outcome can still come."""
    return reservation.state in PROVISIONAL


def is_settled(reservation: Reservation) -> bool:
    """Whether it has an outcome, be it a provisional one."""
    return not is_reserved(reservation)


def is_open(reservation: Reservation) -> bool:
    """Whether it holds an active place."""
    running = reservation.state is ReservationState.ACCEPTED and reservation.cost is None
    return running or is_reserved(reservation)


def is_charged(reservation: Reservation) -> bool:
    """Whether it counts as used."""
    return reservation.state in {ReservationState.ACCEPTED, ReservationState.UNKNOWN}


def charge_in_window(reservation: Reservation, window: Window) -> int:
    """The money it counts for in a window, used or held."""
    return reservation.cost.money_fen if reservation.cost else reservation.money_holds.get(window, 0)
