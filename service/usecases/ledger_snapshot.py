"""The numbers that `/metrics` shows of the ledger."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import structlog

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import UNIT_MONEY, AccountState, TenantState, current_counter
from service.domain.tasks import Kind
from service.domain.tenants import Registry, Tenant, Window
from service.telemetry.gauges import AccountSample, MetricsSnapshot, QuotaSample
from service.telemetry.metrics import Metrics
from service.usecases.caches import CachedRegistry
from service.usecases.ports import DeliveryQueue, Ledger, TaskStore
from service.usecases.reports import PolicyReport, report_policies

_log = structlog.get_logger(__name__)

SNAPSHOT_TIMEOUT_SECONDS = 3.0
"""A scrape without the ledger is better than one that Prometheus gives up."""
_REPORTED_WINDOWS = (Window.DAY, Window.MONTH, Window.TOTAL)


@dataclass(kw_only=True, eq=False, repr=False)
class LedgerSnapshot:
    """Reads the ledger for `/metrics`."""

    ledger: Ledger
    tasks: TaskStore
    deliveries: DeliveryQueue
    registry: CachedRegistry
    metrics: Metrics
    _refresh_task: asyncio.Task[None] | None = field(default=None, init=False)

    async def refresh(self) -> None:
        """Read the ledger, or share a read in progress. Never raises: missing values are left out."""
        if self._refresh_task is None or self._refresh_task.done():
            self._refresh_task = asyncio.create_task(self._take())
        await asyncio.shield(self._refresh_task)

    async def _take(self) -> None:
        self.metrics.label_names.refresh()
        snapshot = None
        try:
            async with asyncio.timeout(SNAPSHOT_TIMEOUT_SECONDS):
                snapshot = await self._read_ledger(self.registry.current)
        except (LedgerUnavailable, TimeoutError):
            pass  # counted by the storage metrics
        except Exception:  # noqa: BLE001 - all other metrics are still valid
            _log.exception("metrics.snapshot_error")
        self.metrics.ledger_collector.set_snapshot(snapshot)

    async def _read_ledger(self, registry: Registry) -> MetricsSnapshot:
        tenants = tuple(registry.tenants.values())
        states, now = await self.ledger.tenant_states([tenant.id for tenant in tenants])
        accounts = await self.ledger.account_states([account.id for account in registry.accounts.values()])
        webhooks, failed = await self.deliveries.backlog()
        return MetricsSnapshot(
            tenant_count=len(tenants),
            quotas=self._quota_usage(tenants, states, now),
            active_tasks=self._active_tasks(tenants, states),
            spent_fen=self._spent_fen(tenants, states, now),
            accounts=[
                AccountSample(account.name, account.policy, accounts.get(account.id, AccountState()), now)
                for account in registry.accounts.values()
            ],
            poll_queue=await self.tasks.backlog(),
            webhook_queue=webhooks,
            failed_webhooks=failed,
            clock_offset_ms=await self.ledger.clock_offset(),
        )

    def _quota_usage(
        self, tenants: tuple[Tenant, ...], states: Mapping[int, TenantState], now: int
    ) -> tuple[QuotaSample, ...]:
        """Report each policy; of tenants with one label, the one nearest to its limit."""
        reports: dict[tuple[str, str], PolicyReport] = {}
        for tenant in tenants:
            for report in report_policies(tenant, states[tenant.id], now):
                key = self.metrics.label_names.of_tenant(tenant.id), report.policy
                reports[key] = max(reports.get(key, report), report, key=_used_ratio)
        return tuple(_to_quota_usage(tenant, report) for (tenant, _), report in reports.items())

    def _active_tasks(
        self, tenants: tuple[Tenant, ...], states: Mapping[int, TenantState]
    ) -> Mapping[tuple[str, str], int]:
        counts: Counter[tuple[str, str]] = Counter()
        for tenant in tenants:
            name, kinds = self.metrics.label_names.of_tenant(tenant.id), states[tenant.id].active_by_kind
            for kind in Kind:
                if kind in kinds or tenant.can_submit(kind):
                    counts[name, kind.value] += kinds.get(kind, 0)
        return counts

    def _spent_fen(
        self, tenants: tuple[Tenant, ...], states: Mapping[int, TenantState], now: int
    ) -> Mapping[tuple[str, str], int]:
        spent: Counter[tuple[str, str]] = Counter()
        for tenant in tenants:
            for window in _REPORTED_WINDOWS:
                money = current_counter(states[tenant.id], window, now).money_fen
                spent[self.metrics.label_names.of_tenant(tenant.id), window.value] += money
        return spent


def _used_ratio(report: PolicyReport) -> float:
    # A limit of 0 is always reached.
    return (report.used + report.reserved) / report.limit if report.limit else 1.0


def _to_quota_usage(tenant: str, report: PolicyReport) -> QuotaSample:
    is_money = report.unit == UNIT_MONEY
    scale = 100 if is_money else 1
    return QuotaSample(
        tenant=tenant,
        policy=report.policy,
        unit="yuan" if is_money else report.unit,
        used=report.used / scale,
        reserved=report.reserved / scale,
        limit=report.limit / scale,
    )
