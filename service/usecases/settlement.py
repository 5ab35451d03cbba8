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
from service.usecases.caches import CachedRegistry
from service.usecases.ports import Ledger, ReserveRequest, Settlement

_log = structlog.get_logger(__name__)

SENDER, READER, EXPIRY = "sender", "reader", "expiry"  # what determined an outcome
RETRY_SECONDS = (0.1, 0.3, 1.0, 3.0, 5.0)
"""Delays between attempts to settle; the last one repeats."""


class SettlementQueue:
    """Settles reservations; an outcome that can't be written now is retried in the background."""

    def __init__(self, ledger: Ledger, supervisor: TaskSupervisor, registry: CachedRegistry) -> None:
        self._ledger = ledger
        self._registry = registry
        self._supervisor = supervisor
        self._pending: deque[Settlement] = deque()
        self._retry_task: asyncio.Task[None] | None = None

    @property
    def pending_count(self) -> int:
        return len(self._pending)

    async def settle(self, settlement: Settlement) -> None:
        """Settle now or later; never raises but for a cancellation, so the caller can answer.

        Errors of the gateway itself are retried too: an accepted image is not answered with a 500.
        """
        try:
            await self._write(settlement)
        except asyncio.CancelledError:
            self._retry_later(settlement)
            raise
        except LedgerUnavailable:
            _log.warning("settlement.retrying", reservation=settlement.reservation, outcome=settlement.outcome)
        except Exception:  # noqa: BLE001 - the outcome must be settled in any case
            _log.exception("settlement.retrying", reservation=settlement.reservation, outcome=settlement.outcome)
        else:
            return
        self._retry_later(settlement)

    def write_tombstone(self, request: ReserveRequest) -> None:
        """Refuse a reservation whose verdict never arrived: it may be held, or still arrive."""
        if not request.accounts:
            return  # nothing can be held without an account
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
            self._retry_task = self._supervisor.spawn(self._retry_pending(), detached=True)  # serves many requests

    async def _retry_pending(self) -> None:
        delays = chain(RETRY_SECONDS, repeat(RETRY_SECONDS[-1]))
        try:
            await asyncio.sleep(next(delays))
            while self._pending:
                try:
                    await self._write(self._pending[0])
                except Exception:  # noqa: BLE001 - logged once, retried until it succeeds
                    self._pending.rotate(-1)  # an error of one must not block the others
                    await asyncio.sleep(next(delays))
                else:
                    self._pending.popleft()
                    delays = chain(RETRY_SECONDS, repeat(RETRY_SECONDS[-1]))
        except asyncio.CancelledError:
            # Their leases settle them as unknown; the first read of an accepted task corrects that.
            for settlement in self._pending:
                _log.error("settlement.abandoned", reservation=settlement.reservation, outcome=settlement.outcome)
            raise

    async def _write(self, settlement: Settlement) -> None:
        booked = await self._ledger.settle(settlement)
        log_settlement(self._registry.current, settlement, source=SENDER, booked=booked)


def log_settlement(registry: Registry, settlement: Settlement, *, source: str, booked: bool) -> None:
    """Log an outcome; as a warning if it is unknown or was not settled by its sender."""
    balance = settlement.balance
    is_expected = source == SENDER and settlement.outcome is not ReservationState.UNKNOWN
    _log.log(
        logging.INFO if is_expected else logging.WARNING,
        "reservation.settled",
        reservation=settlement.reservation,
        tenant=registry.tenant_name(settlement.tenant),
        account=registry.account_name(settlement.account),
        kind=settlement.kind,
        outcome=settlement.outcome,
        booked=booked,
        by=source,
        remaining_uses=balance.count,
        remaining_yuan=None if balance.money_fen is None else fen_to_yuan(balance.money_fen),
        closes=settlement.account_status,
    )
