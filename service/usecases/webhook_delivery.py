"""Delivery of webhook events."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

import structlog

from service.domain import tenants, webhooks
from service.domain.errors import GatewayError
from service.domain.tasks import Sealer, Task
from service.domain.tenants import Tenant
from service.domain.webhooks import DeliveryState
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import UNTRACED, Tracer
from service.usecases.background import ended, rounds
from service.usecases.ports import Agenda, Callbacks, Claimed, Clock, Delivery, Outcome, RegistryView, Tasks

_log = structlog.get_logger(__name__)


_OFF = "This address was switched off."


class Deliver:
    """Sends the deliveries that are due. `render` makes the body, `switch_off` forgets an address of a tenant."""

    def __init__(
        self,
        *,
        agenda: Agenda,
        tasks: Tasks,
        callbacks: Callbacks,
        registry: RegistryView,
        secrets: Sealer,
        switch_off: Callable[[int, str], Awaitable[None]],
        render: Callable[[Task], bytes],
        clock: Clock,
        metrics: Metrics,
        tracer: Tracer = UNTRACED,
        at_once: int = 64,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._agenda = agenda
        self._tasks = tasks
        self._callbacks = callbacks
        self._registry = registry
        self._secrets = secrets
        self._switch_off = switch_off
        self._render = render
        self._clock = clock
        self._metrics = metrics
        self._tracer = tracer
        self._at_once = at_once
        self._chance = chance
        self._sending: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Deliver until cancelled."""
        try:
            await rounds("deliver", self.tick)
        finally:
            await ended(self._sending)

    async def tick(self) -> bool:
        """Claim as many deliveries as there is room for and begin to send them; whether more may be due.

        None before the registry is there: a tenant that is not known would look as if it had been deleted.
        """
        if not self._registry.ready:
            return False
        room = self._at_once - len(self._sending)
        if room <= 0:
            await asyncio.wait(self._sending, return_when=asyncio.FIRST_COMPLETED)
            return True
        claimed = await self._agenda.claim(room)
        for each in claimed:
            sending = asyncio.create_task(self._guarded_deliver(each))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)
        return bool(claimed)

    async def settled(self) -> None:
        """Wait until nothing is being sent."""
        while self._sending:
            await asyncio.wait(self._sending)

    async def _guarded_deliver(self, claimed: Claimed) -> None:
        """Deliver one; what fails on our side is due again when its claim runs out."""
        try:
            await self._deliver(claimed)
        except GatewayError as error:
            _log.warning("delivery.put-off", delivery=_id(claimed.delivery), error=type(error).__name__)
        except Exception:  # noqa: BLE001 - nobody awaits it
            _log.exception("delivery.crashed", delivery=_id(claimed.delivery))

    async def _deliver(self, claimed: Claimed) -> None:
        delivery = claimed.delivery
        outcome = await self._outcome(delivery)
        if outcome.state is DeliveryState.OFF and outcome.attempted:
            await self._switch_off(delivery.tenant, delivery.url)
        if not await self._agenda.record(claimed, outcome):
            return
        self._metrics.delivered(outcome.state, self._clock.now() - delivery.created / 1000)
        _log.log(
            logging.INFO if outcome.state is DeliveryState.DELIVERED else logging.WARNING,
            "delivery.attempted",
            delivery=_id(delivery),
            tenant=self._registry.current.tenant_name(delivery.tenant),
            address=tenants.without_query(delivery.url),
            state=outcome.state,
            status=outcome.status,
            error=outcome.error,
            again_in=outcome.wait / 1000,
        )

    async def _outcome(self, delivery: Delivery) -> Outcome:
        """Make an attempt, if that is still wanted."""
        tenant = await self._tenant(delivery.tenant)
        if tenant is None:
            return _given_up("The tenant was deleted.")
        if not tenant.webhook.permits(delivery.url):
            return _given_up("This address is not allowed any more.")
        if tenant.webhook.is_off(delivery.url):
            return Outcome(state=DeliveryState.OFF, attempted=False, error=_OFF)
        found = await self._tasks.get(delivery.reservation)
        if found is None:
            return _given_up("The task is not known any more.")
        task = found[0]
        with self._tracer.follow_up("deliver webhook", task.trace, delivery.reservation):
            return await self._attempt(delivery, tenant, self._render(task))

    async def _attempt(self, delivery: Delivery, tenant: Tenant, body: bytes) -> Outcome:
        now, signing = self._clock.now(), tenant.webhook.signing
        sealed = signing.in_force(now) if signing else ()
        keys = [key for key in map(self._secrets.open, sealed) if key is not None]
        if not keys:  # what sealed them was taken away, and may come back
            return self._again(delivery, error="The secret can't be opened by any of the gateway's keys.")
        headers = webhooks.headers(_id(delivery), now, body, keys)
        reply = await self._callbacks.post(delivery.url, headers, body, tenant.webhook)
        state = webhooks.judge(reply.status)
        if state is DeliveryState.DELIVERED:
            return Outcome(state=state, status=reply.status)
        error = reply.error or f"It answered {reply.status}."
        if state is DeliveryState.OFF:
            return Outcome(state=state, status=reply.status, error=error, answer=reply.answer)
        return self._again(delivery, reply.status, reply.retry_after, error=error, answer=reply.answer)

    def _again(
        self,
        delivery: Delivery,
        status: int | None = None,
        retry_after: float | None = None,
        *,
        error: str,
        answer: str | None = None,
    ) -> Outcome:
        """A failure, after which it is tried again as long as that may help."""
        wait = webhooks.wait_after(delivery.attempts + 1, self._chance(), status, retry_after)
        if wait is None:
            return Outcome(state=DeliveryState.FAILED, status=status, error=error, answer=answer)
        wait_ms = int(wait * 1000)
        return Outcome(state=DeliveryState.PENDING, wait=wait_ms, status=status, error=error, answer=answer)

    async def _tenant(self, tenant_id: int) -> Tenant | None:
        """A tenant, in the newest version of the registry before it is held to be deleted."""
        known = self._registry.current.tenant(tenant_id)
        if known is None:
            await self._registry.refresh()
            known = self._registry.current.tenant(tenant_id)
        return known


def _id(delivery: Delivery) -> str:
    return webhooks.event_id(delivery.reservation)


def _given_up(error: str) -> Outcome:
    return Outcome(state=DeliveryState.FAILED, attempted=False, error=error)
