"""Webhook delivery over fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from service.api.admin_schemas import encode_task_event
from service.crypto import Keyring
from service.domain.tenants import Registry, Webhook, WebhookSecrets
from service.domain.webhooks import DeliveryState
from service.telemetry.metrics import Metrics
from service.usecases.ports import CheckResult, Delivery, WebhookResponse
from service.usecases.webhook_delivery import WebhookAdmin, WebhookDispatcher
from tests.fakes import FakeDeliveryQueue, FakeWebhookClient
from tests.unit.fake_gateway import FakeGateway

CIPHER = Keyring([b"k" * 32]).derive("webhook-secret")
URL = "https://hooks.test/ended"


def encrypt_secret(key: bytes) -> bytes:
    return CIPHER.encrypt(key)


@dataclass
class FakeReceivers(FakeWebhookClient):
    """Receivers that never respond at `unresponsive_urls`; `errors` are raised instead of responses."""

    unresponsive_urls: set[str] = field(default_factory=set)
    errors: list[Exception] = field(default_factory=list)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, webhook: Webhook) -> WebhookResponse:
        if url in self.unresponsive_urls:
            await asyncio.Event().wait()
        if self.errors:
            raise self.errors.pop()
        return await super().post(url, headers, body, webhook)


class WebhookGateway:
    """A gateway whose tenant has a webhook, with dispatchers."""

    def __init__(self) -> None:
        self.gateway, self.receivers = FakeGateway(), FakeReceivers()
        self.ledger, self.registry = self.gateway.ledger, self.gateway.registry
        self.deliveries = FakeDeliveryQueue(self.ledger)
        self.metrics = Metrics(CollectorRegistry())
        clock = self.ledger.clock
        self.webhooks = WebhookAdmin(registry=self.registry, deliveries=self.deliveries, cipher=CIPHER, now=clock.now)
        self.dispatcher = self.make_dispatcher()
        self.set_webhook(Webhook(URL, ("other.test",), WebhookSecrets(encrypt_secret(b"s" * 32))))

    def make_dispatcher(self) -> WebhookDispatcher:
        return WebhookDispatcher(
            deliveries=self.deliveries,
            tasks=self.ledger,
            post_webhook=self.receivers.post,
            registry=self.registry,
            cipher=CIPHER,
            encode_task_event=encode_task_event,
            now=self.ledger.clock.now,
            metrics=self.metrics,
            max_concurrent=8,
            jitter=lambda: 0.0,
        )

    def set_webhook(self, hook: Webhook) -> None:
        self.gateway.tenant = replace(self.gateway.tenant, webhook=hook)
        now = self.registry.current
        self.registry.current = Registry(
            now.version + 1, now.next_id, {"shop": self.gateway.tenant}, now.accounts, now.tokens
        )

    @property
    def webhook(self) -> Webhook:
        return self.registry.current.tenants["shop"].webhook

    async def finish_task(self, check: CheckResult | None = None) -> str:
        """Submit an image and finish its task; return the reservation."""
        task = (await self.gateway.submit_image()).task
        if check:
            self.gateway.upstream.next_checks.append(check)
        self.ledger.clock.now_ms += self.ledger.retention.check_interval_ms
        while await self.gateway.poller.start_due():
            pass
        await self.gateway.poller.wait_idle()
        return task.reservation

    async def deliver_due(self) -> None:
        """Deliver everything that is due."""
        while await self.dispatcher.start_due():
            await self.dispatcher.wait_idle()

    def delivery_state(self, reservation: str) -> DeliveryState:
        return self.ledger.deliveries[reservation].state


def make_delivery(reservation: str, url: str) -> Delivery:
    state = DeliveryState.PENDING
    return Delivery(
        reservation=reservation, task_id="task_x", tenant=1, url=url, state=state, created_at=0, updated_at=0
    )
