"""Settlement of submissions, late outcomes included."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from itertools import chain, repeat

import structlog

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import ReservationState
from service.domain.tenants import Registry
from service.telemetry.logging import fen_to_yuan
from service.usecases.background import TaskSupervisor
from service.usecases.ports import Ledger, RegistryView, ReserveRequest, Settlement

_log = structlog.get_logger(__name__)


SENDER, READER, EXPIRY = "sender", "reader", "expiry"
"""Who found an outcome out: who sent the submission, who read the task that came of it, or nobody before its lease."""


RETRY_SECONDS = (0.1, 0.3, 1.0, 3.0, 5.0)
"""Seconds between tries to book an outcome; the last goes on until it is booked."""


class SettlementQueue:
    """Books what became of reservations. An outcome that can't be written now is tried again in the background."""

    def __init__(self, ledger: Ledger, supervisor: TaskSupervisor, registry: RegistryView) -> None:
        self._ledger = ledger
        self._registry = registry
        self._supervisor = supervisor
        self._pending: deque[Settlement] = deque()
        self._retry_task: asyncio.Task[None] | None = None

    @property
    def pending_count(self) -> int:
        """How many outcomes are still to be booked."""
        return len(self._pending)

    async def settle(self, settlement: Settlement) -> None:
        """Book an outcome; when this returns it is booked or will be, so the caller can have its answer.

        That holds for faults of the gateway's own too: an image that was accepted is not answered with a crash.
        """
        try:
            await self._write(settlement)
        except asyncio.CancelledError:
            self._retry_later(settlement)
            raise
        except LedgerUnavailable:
            _log.warning("settlement.retrying", reservation=settlement.reservation, outcome=settlement.outcome)
        except Exception:  # noqa: BLE001 - whatever it is, the outcome has to be booked
            _log.exception("settlement.retrying", reservation=settlement.reservation, outcome=settlement.outcome)
        else:
            return
        self._retry_later(settlement)

    def write_tombstone(self, request: ReserveRequest) -> None:
        """Leave a tombstone for a reservation whose verdict never came: it may be held, or still be on its way."""
        if not request.accounts:
            return  # nothing can be held where there is no account
        settlement = Settlement(
            reservation=request.reservation,
            tenant=request.tenant,
            account=request.accounts[0],
            kind=request.kind,
            created_at=0,
            outcome=ReservationState.NOT_SENT,
        )
        self._retry_later(settlement)

    def _retry_later(self, settlement: Settlement) -> None:
        self._pending.append(settlement)
        if self._retry_task is None or self._retry_task.done():
            self._retry_task = self._supervisor.spawn(self._retry_pending(), detached=True)  # of many requests

    async def _retry_pending(self) -> None:
        """Book what is late, one after the other: however long the store is away, this is a single task."""
        pauses = chain(RETRY_SECONDS, repeat(RETRY_SECONDS[-1]))
        try:
            await asyncio.sleep(next(pauses))
            while self._pending:
                try:
                    await self._write(self._pending[0])
                except Exception:  # noqa: BLE001 - said once, and tried until it is booked
                    self._pending.rotate(-1)  # a fault that only one of them has must not hold up the others
                    await asyncio.sleep(next(pauses))
                else:
                    self._pending.popleft()
                    pauses = chain(RETRY_SECONDS, repeat(RETRY_SECONDS[-1]))
        except asyncio.CancelledError:
            # Their leases settle them as unknown; an accepted one is put right when its task is first read.
            for each in self._pending:
                _log.error("settlement.abandoned", reservation=each.reservation, outcome=each.outcome)
            raise

    async def _write(self, settlement: Settlement) -> None:
        booked = await self._ledger.settle(settlement)
        log_settlement(self._registry.current, settlement, source=SENDER, booked=booked)


def log_settlement(registry: Registry, settlement: Settlement, *, source: str, booked: bool) -> None:
    """Log an outcome; a warning if it has to be looked into, since nobody knows it or its sender did not tell it."""
    account, figures = registry.account_by_id(settlement.account), settlement.balance
    told = source == SENDER and settlement.outcome is not ReservationState.UNKNOWN
    _log.log(
        logging.INFO if told else logging.WARNING,
        "reservation.settled",
        reservation=settlement.reservation,
        tenant=registry.tenant_name(settlement.tenant),
        account=account and account.name,
        kind=settlement.kind,
        outcome=settlement.outcome,
        booked=booked,
        by=source,
        remaining_uses=figures.count,
        remaining_yuan=None if figures.money_fen is None else fen_to_yuan(figures.money_fen),
        closes=settlement.account_status,
    )
