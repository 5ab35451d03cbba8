"""Test doubles of webhook delivery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from service.domain.tasks import Backlog
from service.domain.tenants import Webhook
from service.domain.webhooks import DeliveryState
from service.storage.deliveries import FAILING_MS, KEEP_MS, LEASE_MS, MAX_CONCURRENT
from service.usecases.ports import ClaimedDelivery, Delivery, DeliveryResult, WebhookResponse
from tests.fakes.store import InMemoryStore
from tests.model.ledger_model import queue_name


@dataclass
class FakeDeliveryQueue:
    """DeliveryQueue in memory: a queue for each receiver."""

    store: InMemoryStore

    async def claim(self, limit: int) -> Sequence[ClaimedDelivery]:
        self.store._raise_if_unavailable()
        store, now = self.store, self.store.clock.read_times().ledger_ms
        claimed: list[ClaimedDelivery] = []
        for _, item in sorted((at, name) for name, at in store.receiver_turns.items() if at <= now)[:limit]:
            for name in self._select_for_receiver(item, store.leased_deliveries):
                if store.leased_deliveries[name] <= now:
                    del store.leased_deliveries[name]
                    store.queued_deliveries[name] = now
            free_slots = min(
                self._max_parallel(item) - len(self._select_for_receiver(item, store.leased_deliveries)),
                limit - len(claimed),
            )
            waiting = sorted(
                (store.queued_deliveries[name], name)
                for name in self._select_for_receiver(item, store.queued_deliveries)
            )
            for _, name in [pair for pair in waiting if pair[0] <= now][: max(free_slots, 0)]:
                del store.queued_deliveries[name]
                store.leased_deliveries[name] = now + LEASE_MS
                claimed.append(ClaimedDelivery(store.deliveries[name], now + LEASE_MS))
            self._schedule_receiver(item)
        return claimed

    async def record_attempt(self, claimed: ClaimedDelivery, result: DeliveryResult) -> bool:
        self.store._raise_if_unavailable()
        store, at, name = self.store, self.store.clock.read_times(), claimed.delivery.reservation
        delivery = store.deliveries[name]
        if delivery.state is not DeliveryState.PENDING:
            return False
        delivered = result.state is DeliveryState.DELIVERED
        if not delivered and store.leased_deliveries.get(name) != claimed.lease_expires_at:
            return False
        store.leased_deliveries.pop(name, None)
        store.queued_deliveries.pop(name, None)
        to = queue_name(delivery.tenant, delivery.url)
        if delivered:
            store.failing_until.pop(to, None)
        elif result.attempted:
            store.failing_until[to] = at.ledger_ms + FAILING_MS
        pending = result.state is DeliveryState.PENDING
        store.deliveries[name] = replace(
            delivery,
            state=result.state,
            updated_at=at.server_ms,
            next_attempt_at=at.server_ms + result.retry_delay_ms if pending else None,
            attempts=delivery.attempts + result.attempted,
            status=result.status,
            error=result.error,
            response_excerpt=result.response_excerpt,
        )
        if pending:
            store.queued_deliveries[name] = at.ledger_ms + result.retry_delay_ms
        elif not delivered:
            store.failed_deliveries[name] = at.server_ms
            store.failed_deliveries = {
                failed_delivery: when
                for failed_delivery, when in store.failed_deliveries.items()
                if when > at.server_ms - KEEP_MS
            }
        self._schedule_receiver(to)
        return True

    async def backlog(self) -> tuple[Backlog, int]:
        self.store._raise_if_unavailable()
        now, turns = self.store.clock.read_times().ledger_ms, self.store.receiver_turns
        return Backlog(len(turns), max(now - min(turns.values(), default=now), 0)), len(self.store.failed_deliveries)

    async def list_failed(self, limit: int) -> Sequence[Delivery]:
        self.store._raise_if_unavailable()
        newest = sorted(((at, name) for name, at in self.store.failed_deliveries.items()), reverse=True)
        return [self.store.deliveries[name] for _, name in newest[:limit]]

    async def redeliver(self, reservation: str) -> Delivery | None:
        self.store._raise_if_unavailable()
        delivery = self.store.deliveries.get(reservation)
        if delivery and reservation not in self.store.leased_deliveries:
            self.store.failed_deliveries.pop(reservation, None)
            self.enqueue(replace(delivery, attempts=0))
        return self.store.deliveries.get(reservation)

    def enqueue(self, delivery: Delivery) -> None:
        store, at = self.store, self.store.clock.read_times()
        name = delivery.reservation
        store.deliveries[name] = replace(
            delivery, state=DeliveryState.PENDING, updated_at=at.server_ms, next_attempt_at=at.server_ms
        )
        store.queued_deliveries[name] = at.ledger_ms
        self._schedule_receiver(queue_name(delivery.tenant, delivery.url))

    def _select_for_receiver(self, to: str, among: Mapping[str, int]) -> list[str]:
        deliveries = {name: self.store.deliveries[name] for name in among}
        return [name for name, item in deliveries.items() if queue_name(item.tenant, item.url) == to]

    def _max_parallel(self, to: str) -> int:
        return 1 if self.store.failing_until.get(to, 0) > self.store.clock.read_times().ledger_ms else MAX_CONCURRENT

    def _schedule_receiver(self, to: str) -> None:
        store = self.store
        leases = sorted(
            store.leased_deliveries[name] for name in self._select_for_receiver(to, store.leased_deliveries)
        )
        waiting = (
            []
            if len(leases) >= self._max_parallel(to)
            else [store.queued_deliveries[name] for name in self._select_for_receiver(to, store.queued_deliveries)]
        )
        turns = leases[:1] + waiting
        if turns:
            store.receiver_turns[to] = min(turns)
        else:
            store.receiver_turns.pop(to, None)


@dataclass
class FakeWebhookClient:
    """WebhookClient that responds with `replies`, then 204, and records requests."""

    sent: list[tuple[str, Mapping[str, str], bytes]] = field(default_factory=list)
    replies: list[WebhookResponse] = field(default_factory=list)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, webhook: Webhook) -> WebhookResponse:
        del webhook
        self.sent.append((url, headers, body))
        return self.replies.pop(0) if self.replies else WebhookResponse(status=204)
