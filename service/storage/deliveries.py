"""Webhook deliveries in Redis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from service.domain.tasks import Backlog
from service.domain.webhooks import DeliveryState
from service.storage.ledger import DAY_MS
from service.storage.redis import Keys, RedisScripts, drop_none, overdue_ms, parse_ledger_time, parse_withscores
from service.usecases.ports import ClaimedDelivery, Delivery, DeliveryResult

LEASE_MS = 60_000
"""How long a claimed delivery is its process's, in milliseconds: longer than any attempt takes."""
MAX_CONCURRENT = 4
"""How many deliveries to one receiver are under way at once; one, for `FAILING` milliseconds after one has failed."""
FAILING_MS = 600_000
KEEP_MS = 30 * DAY_MS
KEEP_DELIVERED_MS = 3 * DAY_MS


class _StoredDelivery(Struct):
    """A delivery as the scripts keep it."""

    task_id: str
    tenant: int
    url: str
    state: DeliveryState
    created_at: int
    updated_at: int
    attempts: int
    next_attempt_at: int | None = None
    status: int | None = None
    error: str | None = None
    response_excerpt: str | None = None


class RedisDeliveryQueue:
    """Hands out the deliveries that are due, and keeps those that failed."""

    def __init__(self, scripts: RedisScripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys

    async def claim(self, limit: int) -> Sequence[ClaimedDelivery]:
        """Up to `most` deliveries that are due, of all receivers in turn."""
        now, *rows = await self._call_script("claim_deliveries", limit=limit, lease_ms=LEASE_MS)
        return [
            ClaimedDelivery(_decode_delivery(str(member, "ascii"), packed), now + LEASE_MS) for member, packed in rows
        ]

    async def record_attempt(self, claimed: ClaimedDelivery, result: DeliveryResult) -> bool:
        """Write what became of an attempt; False if it had its outcome, or is somebody else's by now."""
        status, _ = await self._call_script(
            "record_delivery",
            id=claimed.delivery.reservation,
            lease_expires_at=claimed.lease_expires_at,
            state=result.state,
            attempts=int(result.attempted),
            retry_delay_ms=result.retry_delay_ms,
            keep_delivered_ms=KEEP_DELIVERED_MS,
            **drop_none(status=result.status, error=result.error, response_excerpt=result.response_excerpt),
        )
        return bool(status == b"recorded")

    async def backlog(self) -> tuple[Backlog, int]:
        """How many receivers wait for something, how late the first is, and how many deliveries failed in 30 days."""
        *time, receivers, first, failed = await self._scripts.read(
            *self._keys.clock_commands,
            ("ZCARD", self._keys.webhook_queues),
            ("ZRANGE", self._keys.webhook_queues, 0, 0, "WITHSCORES"),
            ("ZCARD", self._keys.failed_deliveries),
        )
        return Backlog(receivers, overdue_ms(parse_withscores(first), parse_ledger_time(*time).ledger_ms)), failed

    async def list_failed(self, limit: int) -> Sequence[Delivery]:
        """Up to `most` deliveries that were given up, the newest first."""
        (rows,) = await self._scripts.read(("ZRANGE", self._keys.failed_deliveries, 0, limit - 1, "REV"))
        ids = [str(each, "ascii") for each in rows]
        found = await self._scripts.read(*(("GET", self._keys.delivery(each)) for each in ids))
        return [_decode_delivery(each, packed) for each, packed in zip(ids, found, strict=True) if packed]

    async def redeliver(self, reservation: str) -> Delivery | None:
        """Begin a delivery anew; None if it is not known (any more)."""
        status, _, *rest = await self._call_script("redeliver", id=reservation)
        return _decode_delivery(reservation, rest[0]) if status == b"redelivered" else None

    async def _call_script(self, script: str, **ask: Any) -> list[Any]:
        keys = [self._keys.clock, self._keys.webhook_queues]
        return await self._scripts.call(script, keys, ask | {"deliveries": delivery_arguments(self._keys)})


def delivery_arguments(keys: Keys) -> dict[str, Any]:
    """Where the scripts keep deliveries, and for how long."""
    return {
        "queues": keys.webhook_queues,
        "failed": keys.failed_deliveries,
        "due_prefix": keys.deliveries_due(""),
        "claimed_prefix": keys.deliveries_claimed(""),
        "failing_prefix": keys.webhook_failing(""),
        "delivery_prefix": keys.delivery(""),
        "keep_ms": KEEP_MS,
        "max_concurrent": MAX_CONCURRENT,
        "failing_ms": FAILING_MS,
    }


def _decode_delivery(reservation: str, packed: bytes) -> Delivery:
    stored = msgspec.msgpack.decode(packed, type=_StoredDelivery)
    return Delivery(reservation=reservation, **msgspec.structs.asdict(stored))
