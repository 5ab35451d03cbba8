"""Telling tenants of the ends of their tasks, with all but the telling in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from service.api.admin_schemas import task_event
from service.crypto import Keyring
from service.domain.tenants import Registry, Signing, Webhook
from service.domain.webhooks import DeliveryState
from service.telemetry.metrics import Metrics
from service.usecases.admin import Change, Webhooks
from service.usecases.ports import Check, Delivery, Reply
from service.usecases.webhook_delivery import Deliver
from tests.fakes import FakeAgenda, FakeCallbacks
from tests.unit.over_fakes import Gateway

SEALER = Keyring([b"k" * 32]).purpose("webhook-secret")
URL = "https://hooks.test/ended"


def sealed(key: bytes) -> bytes:
    return SEALER.seal(key)


@dataclass
class Receivers(FakeCallbacks):
    """Those at a host of `dead` never answer."""

    dead: set[str] = field(default_factory=set)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, webhook: Webhook) -> Reply:
        if url in self.dead:
            await asyncio.Event().wait()
        return await super().post(url, headers, body, webhook)


class Teller:
    """A gateway whose tenant has a webhook, and processes that deliver."""

    def __init__(self) -> None:
        self.gateway, self.receivers = Gateway(), Receivers()
        self.ledger, self.registry = self.gateway.ledger, self.gateway.registry
        self.agenda = FakeAgenda(self.ledger)
        self.metrics = Metrics(CollectorRegistry())
        clock = self.ledger.clock
        change = Change(self.registry, self.registry)
        self.webhooks = Webhooks(change=change, registry=self.registry, agenda=self.agenda, secrets=SEALER, clock=clock)
        self.deliver = self.process()
        self.put(Webhook(URL, ("other.test",), Signing(sealed(b"s" * 32))))

    def process(self) -> Deliver:
        """One more process that delivers."""
        return Deliver(
            agenda=self.agenda,
            tasks=self.ledger,
            callbacks=self.receivers,
            registry=self.registry,
            secrets=SEALER,
            switch_off=self.webhooks.switch_off,
            render=task_event,
            clock=self.ledger.clock,
            metrics=self.metrics,
            at_once=8,
            chance=lambda: 0.0,
        )

    def put(self, hook: Webhook) -> None:
        """Give the tenant another webhook."""
        self.gateway.tenant = replace(self.gateway.tenant, webhook=hook)
        now = self.registry.current
        self.registry.current = Registry(
            now.version + 1, now.next_id, {"shop": self.gateway.tenant}, now.accounts, now.tokens
        )

    @property
    def hook(self) -> Webhook:
        return self.registry.current.tenants["shop"].webhook

    async def end_a_task(self, check: Check | None = None) -> str:
        """Submit an image and let its task end; the reservation."""
        task = (await self.gateway.submitted()).task
        if check:
            self.gateway.upstream.next_checks.append(check)
        self.ledger.clock.at += self.ledger.spans.check_after
        while await self.gateway.watch.tick():
            pass
        await self.gateway.watch.settled()
        return task.reservation

    async def round(self) -> None:
        """Deliver all that is due now."""
        while await self.deliver.tick():
            await self.deliver.settled()

    def state(self, reservation: str) -> DeliveryState:
        return self.ledger.deliveries[reservation].state


def delivery(reservation: str, url: str) -> Delivery:
    """A delivery as it begins."""
    state = DeliveryState.PENDING
    return Delivery(reservation=reservation, task="task_x", tenant=1, url=url, state=state, created=0, updated=0)
