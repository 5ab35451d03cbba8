"""Delivery of webhook events, at least once each, and changes of webhooks.

An attempt that was not recorded is repeated when its claim expires, with the same id and body.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog
from msgspec import Struct
from msgspec.structs import replace
from opentelemetry.trace import Tracer

from service.crypto import AesSivCipher
from service.domain import webhooks
from service.domain.errors import Conflict, GatewayError, NotFound
from service.domain.tasks import Task
from service.domain.tenants import Registry, Tenant, Webhook, WebhookSecrets, strip_query
from service.domain.webhooks import DeliveryState
from service.telemetry import tracing
from service.telemetry.metrics import Metrics
from service.usecases.admin import require
from service.usecases.background import cancel_and_wait, run_periodically
from service.usecases.caches import CachedRegistry, no_change
from service.usecases.ports import (
    ClaimedDelivery,
    Delivery,
    DeliveryQueue,
    DeliveryResult,
    RegistryChange,
    TaskStore,
    WebhookResponse,
)

_log = structlog.get_logger(__name__)

PostWebhook = Callable[[str, Mapping[str, str], bytes, Webhook], Awaitable[WebhookResponse]]
"""Sends headers and a body to a URL once, within a time limit, to an address that is allowed.

Raises Overloaded if this machine can't send, and nothing else.
"""


@dataclass(kw_only=True, eq=False, repr=False)
class WebhookDispatcher:
    deliveries: DeliveryQueue
    tasks: TaskStore
    post_webhook: PostWebhook
    registry: CachedRegistry
    cipher: AesSivCipher
    encode_task_event: Callable[[Task], bytes]
    now: Callable[[], float]
    metrics: Metrics
    tracer: Tracer = tracing.NOOP_TRACER
    max_concurrent: int = 64
    jitter: Callable[[], float] = random.random
    _attempts: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    async def run(self) -> None:
        try:
            await run_periodically("deliver", self.start_due)
        finally:
            await cancel_and_wait(self._attempts)

    async def start_due(self) -> bool:
        """Claim due deliveries and start to send them; return whether more may be due.

        Waits for the registry: without it, tenants would look deleted.
        """
        if not self.registry.is_ready:
            return False
        capacity = self.max_concurrent - len(self._attempts)
        if capacity <= 0:
            await asyncio.wait(self._attempts, return_when=asyncio.FIRST_COMPLETED)
            return True
        claimed = await self.deliveries.claim(capacity)
        for delivery in claimed:
            attempt = asyncio.create_task(self._deliver_safely(delivery))
            self._attempts.add(attempt)
            attempt.add_done_callback(self._attempts.discard)
        return bool(claimed)

    async def wait_idle(self) -> None:
        """Wait until nothing is being sent."""
        while self._attempts:
            await asyncio.wait(self._attempts)

    async def _deliver_safely(self, claimed: ClaimedDelivery) -> None:
        try:
            await self._deliver(claimed)
        except GatewayError as error:
            _log.warning("webhook.deferred", delivery=_event_id(claimed.delivery), error=type(error).__name__)
        except Exception:  # noqa: BLE001 - the task is not awaited; it is due again when its claim expires
            _log.exception("webhook.error", delivery=_event_id(claimed.delivery))

    async def _deliver(self, claimed: ClaimedDelivery) -> None:
        delivery = claimed.delivery
        result = await self._make_result(delivery)
        if result.state is DeliveryState.DISABLED and result.attempted:
            await self.disable_url(delivery.tenant, delivery.url)
        if not await self.deliveries.record_attempt(claimed, result):
            return
        self.metrics.record_delivery(result.state, self.now() - delivery.created_at / 1000)
        _log.log(
            logging.INFO if result.state is DeliveryState.DELIVERED else logging.WARNING,
            "webhook.attempted",
            delivery=_event_id(delivery),
            tenant=self.registry.current.tenant_name(delivery.tenant),
            address=strip_query(delivery.url),
            state=result.state,
            status=result.status,
            error=result.error,
            retry_in=result.retry_delay_ms / 1000,
        )

    async def _make_result(self, delivery: Delivery) -> DeliveryResult:
        tenant = self.registry.current.tenant_by_id(delivery.tenant)
        if tenant is None:  # this copy of the registry may be out of date
            await self.registry.refresh()
            tenant = self.registry.current.tenant_by_id(delivery.tenant)
        if tenant is None:
            return _failed_result("The tenant was deleted.")
        if not tenant.webhook.allows_url(delivery.url):
            return _failed_result("This address is not allowed any more.")
        if tenant.webhook.is_disabled(delivery.url):
            return DeliveryResult(state=DeliveryState.DISABLED, attempted=False, error="This address is disabled.")
        if delivery.body is not None:
            return await self._send(delivery, tenant, delivery.body.encode())
        stored = await self.tasks.get(delivery.id)
        if stored is None:
            return _failed_result("The task has expired.")
        task = stored[0]
        with tracing.start_linked_span(self.tracer, "deliver webhook", task.trace_context, delivery.id):
            return await self._send(delivery, tenant, self.encode_task_event(task))

    async def _send(self, delivery: Delivery, tenant: Tenant, body: bytes) -> DeliveryResult:
        now, secrets = self.now(), tenant.webhook.secrets
        encrypted = secrets.active_secrets(now) if secrets else ()
        keys = [key for key in map(self.cipher.decrypt, encrypted) if key is not None]
        if keys:
            headers = webhooks.sign_headers(_event_id(delivery), now, body, keys)
            response = await self.post_webhook(delivery.url, headers, body, tenant.webhook)
        else:  # their key was removed, and may be restored
            response = WebhookResponse(error="None of the gateway's keys decrypts the secret.")
        state, delay = webhooks.classify_response(response.status), None
        if state is DeliveryState.DELIVERED:
            return DeliveryResult(state=state, status=response.status)
        if state is DeliveryState.PENDING:
            delay = webhooks.retry_delay(
                delivery.attempts + 1, self.jitter(), response.status, response.retry_after_seconds
            )
            state = DeliveryState.FAILED if delay is None else DeliveryState.PENDING
        return DeliveryResult(
            state=state,
            retry_delay_ms=int((delay or 0) * 1000),
            status=response.status,
            error=response.error or f"It answered {response.status}.",
            response_excerpt=response.excerpt,
        )

    async def disable_url(self, tenant_id: int, url: str) -> None:
        """Send nothing to a URL until its tenant is updated. Raises Overloaded."""

        def change(registry: Registry) -> tuple[RegistryChange, None]:
            tenant = registry.tenant_by_id(tenant_id)
            if tenant is None:  # deleted meanwhile
                return no_change(registry), None
            tenant = replace(tenant, webhook=tenant.webhook.with_disabled_url(url))
            return replace(no_change(registry), tenants=(tenant,)), None

        await self.registry.write_change(
            "webhook.disabled",
            change,
            tenant=self.registry.current.tenant_name(tenant_id),
            address=strip_query(url),
        )


def _event_id(delivery: Delivery) -> str:
    return webhooks.event_id(delivery.id)


def _failed_result(error: str) -> DeliveryResult:
    return DeliveryResult(state=DeliveryState.FAILED, attempted=False, error=error)


class NewSecret(Struct, frozen=True):
    """A new secret: the only time its text is known. Times in seconds since the epoch."""

    text: str
    previous_expires_at: float


class TenantDelivery(Struct, frozen=True):
    """A delivery with the name of its tenant, None if unknown."""

    delivery: Delivery
    tenant: str | None


@dataclass(kw_only=True, eq=False, repr=False)
class WebhookAdmin:
    """Rotates webhook secrets, and lists and repeats failed deliveries."""

    registry: CachedRegistry
    deliveries: DeliveryQueue
    cipher: AesSivCipher
    now: Callable[[], float]

    async def rotate_secret(self, name: str, grace_seconds: float) -> NewSecret:
        """Generate a new secret; the current one signs too during the grace. Raises NotFound or Conflict."""
        text, previous_expires_at = webhooks.generate_secret(), self.now() + grace_seconds
        secret = self.cipher.encrypt(webhooks.parse_secret(text))

        def change(registry: Registry) -> tuple[RegistryChange, None]:
            tenant = require(registry.tenants.get(name), name, "tenant")
            if tenant.webhook.secrets is None:
                raise Conflict(f"Tenant {name} has no webhook secret. It gets one with its webhook.")
            previous = tenant.webhook.secrets.current if grace_seconds else None
            webhook = replace(tenant.webhook, secrets=WebhookSecrets(secret, previous, previous_expires_at))
            return replace(no_change(registry), tenants=(replace(tenant, webhook=webhook),)), None

        await self.registry.write_change("webhook.secret_rotated", change, tenant=name, grace=grace_seconds)
        return NewSecret(text, previous_expires_at)

    async def list_failed(self, limit: int) -> Sequence[TenantDelivery]:
        """Return up to `limit` deliveries that failed in the last 30 days, newest first."""
        return [self._with_tenant_name(delivery) for delivery in await self.deliveries.list_failed(limit)]

    async def redeliver(self, event: str) -> TenantDelivery:
        """Send an event again now. Raises NotFound."""
        name = webhooks.parse_event_id(event)
        delivery = await self.deliveries.redeliver(name) if name else None
        if delivery is None:
            raise NotFound(f"There is no delivery {event} (any more).")
        result = self._with_tenant_name(delivery)
        _log.info("webhook.redelivered", delivery=event, tenant=result.tenant)
        return result

    def _with_tenant_name(self, delivery: Delivery) -> TenantDelivery:
        return TenantDelivery(delivery, self.registry.current.tenant_name(delivery.tenant))
