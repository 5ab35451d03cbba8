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
from service.telemetry.logging import yuan
from service.usecases.background import Background
from service.usecases.ports import Ask, Ledger, RegistryView, Settlement

_log = structlog.get_logger(__name__)


SENDER, READER, EXPIRY = "sender", "reader", "expiry"
"""Who found an outcome out: who sent the submission, who read the task that came of it, or nobody before its lease."""


RETRIES = (0.1, 0.3, 1.0, 3.0, 5.0)
"""Seconds between tries to book an outcome; the last goes on until it is booked."""


class Settle:
    """Books what became of reservations. An outcome that can't be written now is tried again in the background."""

    def __init__(self, ledger: Ledger, background: Background, registry: RegistryView) -> None:
        self._ledger = ledger
        self._registry = registry
        self._background = background
        self._late: deque[Settlement] = deque()
        self._booking: asyncio.Task[None] | None = None

    @property
    def late(self) -> int:
        """How many outcomes are still to be booked."""
        return len(self._late)

    async def __call__(self, settlement: Settlement) -> None:
        """Book an outcome; when this returns it is booked or will be, so the caller can have its answer.

        That holds for faults of the gateway's own too: an image that was accepted is not answered with a crash.
        """
        try:
            await self._book(settlement)
        except asyncio.CancelledError:
            self._book_later(settlement)
            raise
        except LedgerUnavailable:
            _log.warning("settlement.delayed", reservation=settlement.reservation, outcome=settlement.outcome)
        except Exception:  # noqa: BLE001 - whatever it is, the outcome has to be booked
            _log.exception("settlement.delayed", reservation=settlement.reservation, outcome=settlement.outcome)
        else:
            return
        self._book_later(settlement)

    def give_up(self, ask: Ask) -> None:
        """Leave a tombstone for a reservation whose verdict never came: it may be held, or still be on its way."""
        if not ask.accounts:
            return  # nothing can be held where there is no account
        settlement = Settlement(
            reservation=ask.reservation,
            tenant=ask.tenant,
            account=ask.accounts[0],
            kind=ask.kind,
            created=0,
            outcome=ReservationState.NOT_SENT,
        )
        self._book_later(settlement)

    def _book_later(self, settlement: Settlement) -> None:
        self._late.append(settlement)
        if self._booking is None or self._booking.done():
            self._booking = self._background.spawn(self._book_late(), apart=True)  # of many requests

    async def _book_late(self) -> None:
        """Book what is late, one after the other: however long the store is away, this is a single task."""
        pauses = chain(RETRIES, repeat(RETRIES[-1]))
        try:
            await asyncio.sleep(next(pauses))
            while self._late:
                try:
                    await self._book(self._late[0])
                except Exception:  # noqa: BLE001 - said once, and tried until it is booked
                    self._late.rotate(-1)  # a fault that only one of them has must not hold up the others
                    await asyncio.sleep(next(pauses))
                else:
                    self._late.popleft()
                    pauses = chain(RETRIES, repeat(RETRIES[-1]))
        except asyncio.CancelledError:
            # Their leases settle them as unknown; an accepted one is put right when its task is first read.
            for each in self._late:
                _log.error("settlement.abandoned", reservation=each.reservation, outcome=each.outcome)
            raise

    async def _book(self, settlement: Settlement) -> None:
        booked = await self._ledger.settle(settlement)
        tell(self._registry.current, settlement, by=SENDER, booked=booked)


def tell(registry: Registry, settlement: Settlement, *, by: str, booked: bool) -> None:
    """Log an outcome; a warning if it has to be looked into, since nobody knows it or its sender did not tell it."""
    account, figures = registry.account(settlement.account), settlement.figures
    told = by == SENDER and settlement.outcome is not ReservationState.UNKNOWN
    _log.log(
        logging.INFO if told else logging.WARNING,
        "reservation.settled",
        reservation=settlement.reservation,
        tenant=registry.tenant_name(settlement.tenant),
        account=account and account.name,
        kind=settlement.kind,
        outcome=settlement.outcome,
        booked=booked,
        by=by,
        remaining_uses=figures.count,
        remaining_yuan=None if figures.money is None else yuan(figures.money),
        closes=settlement.closes,
    )
