"""Webhook deliveries in Redis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from service.domain.tasks import Backlog
from service.domain.thresholds import Threshold
from service.storage.redis import DAY_MS, Keys, RedisScripts, overdue_ms
from service.usecases.ports import ClaimedDelivery, Delivery, DeliveryResult

LEASE_MS = 60_000
"""Longer than any attempt takes."""
MAX_CONCURRENT = 4
"""The deliveries of a queue that are sent at once; one, for FAILING_MS after a failure."""
FAILING_MS = 600_000
KEEP_MS = 30 * DAY_MS
KEEP_DELIVERED_MS = 3 * DAY_MS


class RedisDeliveryQueue:
    def __init__(self, scripts: RedisScripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys

    async def queue_threshold(self, name: str, tenant: int, url: str, threshold: Threshold, body: bytes) -> bool:
        status, _ = await self._scripts.call(
            "queue_threshold",
            [self._keys.clock, self._keys.tenant(tenant), self._keys.webhook_queues],
            id=name,
            name=threshold.name,
            window_start=threshold.window_start,
            limit=threshold.limit,
            # Gateways before 0.5.0 read no delivery without a task.
            delivery={"task_id": "", "tenant": tenant, "url": url, "threshold": threshold.name, "body": body.decode()},
            deliveries=delivery_arguments(self._keys),
        )
        return bool(status == b"queued")

    async def claim(self, limit: int) -> Sequence[ClaimedDelivery]:
        now, *rows = await self._call_script("claim_deliveries", limit=limit, lease_ms=LEASE_MS)
        return [
            ClaimedDelivery(_decode_delivery(str(member, "ascii"), packed), now + LEASE_MS) for member, packed in rows
        ]

    async def record_attempt(self, claimed: ClaimedDelivery, result: DeliveryResult) -> bool:
        status, _ = await self._call_script(
            "record_delivery",
            id=claimed.delivery.id,
            lease_expires_at=claimed.lease_expires_at,
            state=result.state,
            attempts=int(result.attempted),
            retry_delay_ms=result.retry_delay_ms,
            keep_delivered_ms=KEEP_DELIVERED_MS,
            status=result.status,
            error=result.error,
            response_excerpt=result.response_excerpt,
        )
        return bool(status == b"recorded")

    async def backlog(self) -> tuple[Backlog, int]:
        *time, queues, first, failed = await self._scripts.read(
            *self._keys.clock_commands,
            ("ZCARD", self._keys.webhook_queues),
            ("ZRANGE", self._keys.webhook_queues, 0, 0, "WITHSCORES"),
            ("ZCARD", self._keys.failed_deliveries),
        )
        return Backlog(queues, overdue_ms(first, *time)), failed

    async def list_failed(self, limit: int) -> Sequence[Delivery]:
        (rows,) = await self._scripts.read(("ZRANGE", self._keys.failed_deliveries, 0, limit - 1, "REV"))
        ids = [str(member, "ascii") for member in rows]
        deliveries = await self._scripts.read(*(("GET", self._keys.delivery(name)) for name in ids))
        return [_decode_delivery(name, packed) for name, packed in zip(ids, deliveries, strict=True) if packed]

    async def redeliver(self, delivery: str) -> Delivery | None:
        status, _, *rest = await self._call_script("redeliver", id=delivery)
        return _decode_delivery(delivery, rest[0]) if status == b"redelivered" else None

    async def _call_script(self, script: str, **arguments: Any) -> list[Any]:
        keys = [self._keys.clock, self._keys.webhook_queues]
        return await self._scripts.call(script, keys, deliveries=delivery_arguments(self._keys), **arguments)


def delivery_arguments(keys: Keys) -> dict[str, Any]:
    """Return the argument `deliveries` of scripts (shared/deliveries.lua)."""
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


def _decode_delivery(name: str, packed: bytes) -> Delivery:
    return msgspec.convert(msgspec.msgpack.decode(packed) | {"id": name}, Delivery)
