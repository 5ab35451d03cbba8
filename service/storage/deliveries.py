"""Webhook deliveries in Redis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from service.domain.tasks import Backlog
from service.domain.webhooks import DeliveryState
from service.storage.ledger import DAY
from service.storage.redis import Keys, Scripts, given, moment, overdue, scored
from service.usecases.ports import Claimed, Delivery, Outcome

LEASE = 60_000
"""How long a claimed delivery is its process's, in milliseconds: longer than any attempt takes."""


AT_ONCE = 4
"""How many deliveries to one receiver are under way at once; one, for `FAILING` milliseconds after one has failed."""


FAILING = 600_000


KEEP = 30 * DAY


KEEP_DELIVERED = 3 * DAY


class _Stored(Struct):
    """A delivery as the scripts keep it."""

    task: str
    tenant: int
    url: str
    state: DeliveryState
    created: int
    updated: int
    attempts: int
    due: int | None = None
    status: int | None = None
    error: str | None = None
    answer: str | None = None


class RedisAgenda:
    """Hands out the deliveries that are due, and keeps those that failed."""

    def __init__(self, scripts: Scripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys

    async def claim(self, most: int) -> Sequence[Claimed]:
        """Up to `most` deliveries that are due, of all receivers in turn."""
        now, *rows = await self._call("claim_deliveries", most=most, lease=LEASE)
        return [Claimed(_read(str(member, "ascii"), packed), now + LEASE) for member, packed in rows]

    async def record(self, claimed: Claimed, outcome: Outcome) -> bool:
        """Write what became of an attempt; False if it had its outcome, or is somebody else's by now."""
        status, _ = await self._call(
            "record_delivery",
            id=claimed.delivery.reservation,
            leased=claimed.leased,
            state=outcome.state,
            attempts=int(outcome.attempted),
            wait=outcome.wait,
            keep_delivered=KEEP_DELIVERED,
            **given(status=outcome.status, error=outcome.error, answer=outcome.answer),
        )
        return bool(status == b"recorded")

    async def backlog(self) -> tuple[Backlog, int]:
        """How many receivers wait for something, how late the first is, and how many deliveries failed in 30 days."""
        *time, receivers, first, failed = await self._scripts.read(
            *self._keys.moment,
            ("ZCARD", self._keys.receivers),
            ("ZRANGE", self._keys.receivers, 0, 0, "WITHSCORES"),
            ("ZCARD", self._keys.failed_deliveries),
        )
        return Backlog(receivers, overdue(scored(first), moment(*time).now)), failed

    async def failed(self, most: int) -> Sequence[Delivery]:
        """Up to `most` deliveries that were given up, the newest first."""
        (rows,) = await self._scripts.read(("ZRANGE", self._keys.failed_deliveries, 0, most - 1, "REV"))
        ids = [str(each, "ascii") for each in rows]
        found = await self._scripts.read(*(("GET", self._keys.delivery(each)) for each in ids))
        return [_read(each, packed) for each, packed in zip(ids, found, strict=True) if packed]

    async def redeliver(self, reservation: str) -> Delivery | None:
        """Begin a delivery anew; None if it is not known (any more)."""
        status, _, *rest = await self._call("redeliver", id=reservation)
        return _read(reservation, rest[0]) if status == b"again" else None

    async def _call(self, script: str, **ask: Any) -> list[Any]:
        keys = [self._keys.clock, self._keys.receivers]
        return await self._scripts.call(script, keys, ask | {"agenda": agenda_of(self._keys)})


def agenda_of(keys: Keys) -> dict[str, Any]:
    """Where the scripts keep deliveries, and for how long."""
    return {
        "receivers": keys.receivers,
        "queue": keys.deliveries_due(""),
        "claims": keys.deliveries_claimed(""),
        "failing": keys.failing(""),
        "delivery": keys.delivery(""),
        "failed": keys.failed_deliveries,
        "keep": KEEP,
        "at_once": AT_ONCE,
        "failing_for": FAILING,
    }


def _read(reservation: str, packed: bytes) -> Delivery:
    stored = msgspec.msgpack.decode(packed, type=_Stored)
    return Delivery(reservation=reservation, **msgspec.structs.asdict(stored))
