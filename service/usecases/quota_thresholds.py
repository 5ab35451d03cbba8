"""Reports reached thresholds of limits to their tenants.

The state of the limits decides, so a threshold is reported although the process died that made the tenant reach it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from service.domain.errors import LedgerUnavailable
from service.domain.tenants import Tenant, strip_query
from service.domain.thresholds import Threshold, reached_thresholds
from service.usecases.background import run_in_turns
from service.usecases.caches import CachedRegistry
from service.usecases.ports import DeliveryQueue, Ledger

_log = structlog.get_logger(__name__)

CHECK_SECONDS = 2.0
"""Time from one check to the next. Windows are kept for at least a minute after their end."""

EncodeThreshold = Callable[[Tenant, Threshold, int], bytes]
"""Encodes the event of a threshold, given when it was noticed (milliseconds)."""


@dataclass(kw_only=True, eq=False, repr=False)
class ThresholdReporter:
    """Queues a webhook for each reached threshold of a tenant that has an address for them."""

    ledger: Ledger
    deliveries: DeliveryQueue
    registry: CachedRegistry
    encode_event: EncodeThreshold
    _reported: set[str] = field(default_factory=set, init=False)

    async def run(self) -> None:
        """Report for ever."""
        while True:
            try:
                await self.report_reached()
            except LedgerUnavailable:
                pass  # counted by the storage metrics
            except Exception:  # noqa: BLE001 - one error must not end the job
                _log.exception("job.error", job="thresholds")
            await asyncio.sleep(CHECK_SECONDS)

    async def report_reached(self) -> None:
        """Report what has been reached. Raises LedgerUnavailable."""
        tenants = [
            tenant
            for tenant in self.registry.current.tenants.values()
            if tenant.webhook.url and any(limit.warn_at for limit in tenant.policy.limits)
        ]
        if not tenants:
            return
        figures, now = await self.ledger.tenant_figures([tenant.id for tenant in tenants])
        found = await run_in_turns(
            (tenant, list(reached_thresholds(tenant.policy, figures[tenant.id].state, now))) for tenant in tenants
        )
        reached = {
            threshold.event_name(tenant.id): (tenant, threshold) for tenant, items in found for threshold in items
        }
        self._reported &= reached.keys()
        for name, (tenant, threshold) in reached.items():
            if name not in self._reported:
                await self._report(name, tenant, threshold, now)
                self._reported.add(name)

    async def _report(self, name: str, tenant: Tenant, threshold: Threshold, now: int) -> None:
        url, body = tenant.webhook.url or "", self.encode_event(tenant, threshold, now)
        if await self.deliveries.queue_threshold(name, tenant.id, url, threshold, body):
            _log.info(
                "quota.threshold_reached",
                tenant=tenant.name,
                policy=threshold.policy,
                percent=threshold.percent,
                address=strip_query(url),
            )
