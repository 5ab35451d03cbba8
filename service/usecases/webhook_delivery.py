"""Delivery of webhook events."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

import structlog

from service.domain import tenants, webhooks
from service.domain.errors import GatewayError
from service.domain.tasks import Cipher, Task
from service.domain.tenants import Tenant
from service.domain.webhooks import DeliveryState
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import NOOP_TRACER, Tracer
from service.usecases.background import cancel_and_wait, run_periodically
from service.usecases.ports import (
    ClaimedDelivery,
    Delivery,
    DeliveryQueue,
    DeliveryResult,
    RegistryView,
    TaskStore,
    WebhookSender,
)

_log = structlog.get_logger(__name__)


_DISABLED_ERROR = "This address was switched off."


class WebhookDispatcher:
    """Sends the deliveries that are due. `render` makes the body, `switch_off` forgets an address of a tenant."""

    def __init__(
        self,
        *,
        deliveries: DeliveryQueue,
        tasks: TaskStore,
        webhooks: WebhookSender,
        registry: RegistryView,
        cipher: Cipher,
        disable_url: Callable[[int, str], Awaitable[None]],
        encode_task_event: Callable[[Task], bytes],
        now: Callable[[], float],
        metrics: Metrics,
        tracer: Tracer = NOOP_TRACER,
        max_concurrent: int = 64,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._deliveries = deliveries
        self._tasks = tasks
        self._webhooks = webhooks
        self._registry = registry
        self._cipher = cipher
        self._disable_url = disable_url
        self._encode_task_event = encode_task_event
        self._now = now
        self._metrics = metrics
        self._tracer = tracer
        self._max_concurrent = max_concurrent
        self._jitter = jitter
        self._attempts: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Deliver until cancelled."""
        try:
            await run_periodically("deliver", self.start_due)
        finally:
            await cancel_and_wait(self._attempts)

    async def start_due(self) -> bool:
        """Claim as many deliveries as there is room for and begin to send them; whether more may be due.

        None before the registry is there: a tenant that is not known would look as if it had been deleted.
        """
        if not self._registry.is_ready:
            return False
        room = self._max_concurrent - len(self._attempts)
        if room <= 0:
            await asyncio.wait(self._attempts, return_when=asyncio.FIRST_COMPLETED)
            return True
        claimed = await self._deliveries.claim(room)
        for each in claimed:
            sending = asyncio.create_task(self._deliver_safely(each))
            self._attempts.add(sending)
            sending.add_done_callback(self._attempts.discard)
        return bool(claimed)

    async def wait_idle(self) -> None:
        """Wait until nothing is being sent."""
        while self._attempts:
            await asyncio.wait(self._attempts)

    async def _deliver_safely(self, claimed: ClaimedDelivery) -> None:
        """Deliver one; what fails on our side is due again when its claim runs out."""
        try:
            await self._deliver(claimed)
        except GatewayError as error:
            _log.warning("webhook.deferred", delivery=_event_id(claimed.delivery), error=type(error).__name__)
        except Exception:  # noqa: BLE001 - nobody awaits it
            _log.exception("webhook.error", delivery=_event_id(claimed.delivery))

    async def _deliver(self, claimed: ClaimedDelivery) -> None:
        delivery = claimed.delivery
        outcome = await self._make_result(delivery)
        if outcome.state is DeliveryState.DISABLED and outcome.attempted:
            await self._disable_url(delivery.tenant, delivery.url)
        if not await self._deliveries.record_attempt(claimed, outcome):
            return
        self._metrics.record_delivery(outcome.state, self._now() - delivery.created_at / 1000)
        _log.log(
            logging.INFO if outcome.state is DeliveryState.DELIVERED else logging.WARNING,
            "webhook.attempted",
            delivery=_event_id(delivery),
            tenant=self._registry.current.tenant_name(delivery.tenant),
            address=tenants.strip_query(delivery.url),
            state=outcome.state,
            status=outcome.status,
            error=outcome.error,
            retry_in=outcome.retry_delay_ms / 1000,
        )

    async def _make_result(self, delivery: Delivery) -> DeliveryResult:
        """Make an attempt, if that is still wanted."""
        tenant = await self._find_tenant(delivery.tenant)
        if tenant is None:
            return _failed_result("The tenant was deleted.")
        if not tenant.webhook.allows_url(delivery.url):
            return _failed_result("This address is not allowed any more.")
        if tenant.webhook.is_disabled(delivery.url):
            return DeliveryResult(state=DeliveryState.DISABLED, attempted=False, error=_DISABLED_ERROR)
        found = await self._tasks.get(delivery.reservation)
        if found is None:
            return _failed_result("The task is not known any more.")
        task = found[0]
        with self._tracer.start_linked_span("deliver webhook", task.trace_context, delivery.reservation):
            return await self._send(delivery, tenant, self._encode_task_event(task))

    async def _send(self, delivery: Delivery, tenant: Tenant, body: bytes) -> DeliveryResult:
        now, signing = self._now(), tenant.webhook.secrets
        sealed = signing.active_secrets(now) if signing else ()
        keys = [key for key in map(self._cipher.decrypt, sealed) if key is not None]
        if not keys:  # what sealed them was taken away, and may come back
            return self._retry_or_fail(delivery, error="The secret can't be opened by any of the gateway's keys.")
        headers = webhooks.sign_headers(_event_id(delivery), now, body, keys)
        reply = await self._webhooks.post(delivery.url, headers, body, tenant.webhook)
        state = webhooks.classify_response(reply.status)
        if state is DeliveryState.DELIVERED:
            return DeliveryResult(state=state, status=reply.status)
        error = reply.error or f"It answered {reply.status}."
        if state is DeliveryState.DISABLED:
            return DeliveryResult(state=state, status=reply.status, error=error, response_excerpt=reply.excerpt)
        return self._retry_or_fail(
            delivery, reply.status, reply.retry_after_seconds, error=error, response_excerpt=reply.excerpt
        )

    def _retry_or_fail(
        self,
        delivery: Delivery,
        status: int | None = None,
        retry_after: float | None = None,
        *,
        error: str,
        response_excerpt: str | None = None,
    ) -> DeliveryResult:
        """A failure, after which it is tried again as long as that may help."""
        wait = webhooks.retry_delay(delivery.attempts + 1, self._jitter(), status, retry_after)
        if wait is None:
            return DeliveryResult(
                state=DeliveryState.FAILED, status=status, error=error, response_excerpt=response_excerpt
            )
        wait_ms = int(wait * 1000)
        return DeliveryResult(
            state=DeliveryState.PENDING,
            retry_delay_ms=wait_ms,
            status=status,
            error=error,
            response_excerpt=response_excerpt,
        )

    async def _find_tenant(self, tenant_id: int) -> Tenant | None:
        """A tenant, in the newest version of the registry before it is held to be deleted."""
        known = self._registry.current.tenant_by_id(tenant_id)
        if known is None:
            await self._registry.refresh()
            known = self._registry.current.tenant_by_id(tenant_id)
        return known


def _event_id(delivery: Delivery) -> str:
    return webhooks.event_id(delivery.reservation)


def _failed_result(error: str) -> DeliveryResult:
    return DeliveryResult(state=DeliveryState.FAILED, attempted=False, error=error)
