"""The numbers that `/metrics` shows of the ledger."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping

import structlog

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import UNIT_MONEY, AccountState, TenantState, current_counter
from service.domain.tasks import Kind
from service.domain.tenants import Registry, Tenant, Window
from service.telemetry.gauges import AccountSample, MetricsSnapshot, QuotaSample
from service.telemetry.metrics import Metrics
from service.usecases.ports import DeliveryQueue, Ledger, RegistryView, TaskStore
from service.usecases.reports import PolicyReport, report_policies

_log = structlog.get_logger(__name__)


SNAPSHOT_TIMEOUT_SECONDS = 3.0
"""A look takes no longer: a scrape without the ledger tells more than one that Prometheus gave up."""


_REPORTED_WINDOWS = (Window.DAY, Window.MONTH, Window.TOTAL)


_YUAN = "yuan"


class LedgerSnapshot:
    """Has the metrics show the ledger as it is."""

    def __init__(
        self, *, ledger: Ledger, tasks: TaskStore, deliveries: DeliveryQueue, registry: RegistryView, metrics: Metrics
    ) -> None:
        self._ledger = ledger
        self._tasks = tasks
        self._deliveries = deliveries
        self._registry = registry
        self._metrics = metrics
        self._refresh_task: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Look now, or share the look that is under way. Never raises: what can't be seen is not shown."""
        if self._refresh_task is None or self._refresh_task.done():
            self._refresh_task = asyncio.create_task(self._take())
        await asyncio.shield(self._refresh_task)

    async def _take(self) -> None:
        self._metrics.refresh_labels()
        seen = None
        try:
            async with asyncio.timeout(SNAPSHOT_TIMEOUT_SECONDS):
                seen = await self._read_ledger(self._registry.current)
        except (LedgerUnavailable, TimeoutError):
            pass  # the metrics say so
        except Exception:  # noqa: BLE001 - all other metrics can be shown
            _log.exception("metrics.snapshot_error")
        self._metrics.ledger_collector.set_snapshot(seen)

    async def _read_ledger(self, registry: Registry) -> MetricsSnapshot:
        tenants = tuple(registry.tenants.values())
        states, now = await self._ledger.tenant_states([each.id for each in tenants])
        accounts = await self._ledger.account_states([each.id for each in registry.accounts.values()])
        webhooks, failed = await self._deliveries.backlog()
        return MetricsSnapshot(
            tenant_count=len(tenants),
            quotas=self._quota_usage(tenants, states, now),
            active_tasks=self._active_tasks(tenants, states),
            spent_fen=self._spent_fen(tenants, states, now),
            accounts=[
                AccountSample(each.name, each.policy, accounts.get(each.id, AccountState()), now)
                for each in registry.accounts.values()
            ],
            poll_queue=await self._tasks.backlog(),
            webhook_queue=webhooks,
            failed_webhooks=failed,
            clock_offset_ms=await self._ledger.clock_offset(),
        )

    def _quota_usage(
        self, tenants: tuple[Tenant, ...], states: Mapping[int, TenantState], now: int
    ) -> tuple[QuotaSample, ...]:
        """Each policy of each tenant; of those that share a name, the one that is nearest to its limit."""
        found: dict[tuple[str, str], PolicyReport] = {}
        for tenant in tenants:
            for report in report_policies(tenant, states[tenant.id], now):
                key = self._metrics.tenant_label(tenant.id), report.policy
                found[key] = max(found.get(key, report), report, key=_used_ratio)
        return tuple(_to_quota_usage(tenant, report) for (tenant, _), report in found.items())

    def _active_tasks(
        self, tenants: tuple[Tenant, ...], states: Mapping[int, TenantState]
    ) -> Mapping[tuple[str, str], int]:
        found: Counter[tuple[str, str]] = Counter()
        for tenant in tenants:
            name, kinds = self._metrics.tenant_label(tenant.id), states[tenant.id].active_by_kind
            for kind in Kind:
                if kind in kinds or tenant.can_submit(kind):
                    found[name, kind.value] += kinds.get(kind, 0)
        return found

    def _spent_fen(
        self, tenants: tuple[Tenant, ...], states: Mapping[int, TenantState], now: int
    ) -> Mapping[tuple[str, str], int]:
        found: Counter[tuple[str, str]] = Counter()
        for tenant in tenants:
            for window in _REPORTED_WINDOWS:
                money = current_counter(states[tenant.id], window, now).money_fen
                found[self._metrics.tenant_label(tenant.id), window.value] += money
        return found


def _used_ratio(report: PolicyReport) -> float:
    """The share of a limit that is used or held; a limit of zero is always reached."""
    return (report.used + report.reserved) / report.limit if report.limit else 1.0


def _to_quota_usage(tenant: str, report: PolicyReport) -> QuotaSample:
    money = report.unit == UNIT_MONEY
    scale = 100 if money else 1
    return QuotaSample(
        tenant=tenant,
        policy=report.policy,
        unit=_YUAN if money else report.unit,
        used=report.used / scale,
        reserved=report.reserved / scale,
        limit=report.limit / scale,
    )
