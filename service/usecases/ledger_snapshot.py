"""The numbers that `/metrics` shows of the ledger."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add

import structlog

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import UNIT_MONEY, AccountState, current_spent, spent_starts
from service.domain.tasks import Kind
from service.domain.tenants import Registry, Tenant
from service.domain.thresholds import current_thresholds
from service.telemetry.gauges import AccountSample, MetricsSnapshot, QuotaSample
from service.telemetry.metrics import Metrics
from service.usecases.background import run_in_turns
from service.usecases.caches import CachedRegistry
from service.usecases.ports import DeliveryQueue, Ledger, TaskStore, TenantFigures
from service.usecases.reports import PolicyReport, report_policies

_log = structlog.get_logger(__name__)

SNAPSHOT_TIMEOUT_SECONDS = 3.0
"""A scrape without the ledger is better than one that Prometheus gives up."""
_KINDS = [(kind, kind.value) for kind in Kind]  # `.value` of an enum is computed at each access


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
        figures, now = await self.ledger.tenant_figures([tenant.id for tenant in tenants])
        accounts = await self.ledger.account_states([account.id for account in registry.accounts.values()])
        webhooks, failed = await self.deliveries.backlog()
        sums = _TenantSums(now)
        names = self.metrics.label_names
        await run_in_turns(map(sums.add, map(names.of_tenant, figures), tenants, figures.values()))
        return MetricsSnapshot(
            tenant_count=len(tenants),
            quotas=[_to_quota_usage(name, report) for (name, _), report in sums.reports.items()],
            thresholds=sums.thresholds,
            active_tasks=sums.active_tasks,
            spent=sums.spent,
            accounts=[
                AccountSample(account.name, account.policy, accounts.get(account.id, AccountState()), now)
                for account in registry.accounts.values()
            ],
            poll_queue=await self.tasks.backlog(),
            webhook_queue=webhooks,
            failed_webhooks=failed,
            clock_offset_ms=await self.ledger.clock_offset(),
        )


class _TenantSums:
    """The figures of tenants at `now`, by their labels: of a policy that several share, that nearest to its limit."""

    def __init__(self, now: int) -> None:
        self.reports: dict[tuple[str, str], PolicyReport] = {}
        self.thresholds: dict[tuple[str, str, str], bool] = {}
        self.active_tasks: Counter[tuple[str, str]] = Counter()
        self.spent: dict[tuple[str, Kind], tuple[Sequence[int], Sequence[int]]] = {}
        self._now, self._spent_starts = now, spent_starts(now)

    def add(self, label: str, tenant: Tenant, figures: TenantFigures) -> None:
        state = figures.state
        for report in report_policies(tenant, state, self._now):
            key = label, report.policy
            former = self.reports.get(key)
            if former is None or _used_ratio(report) > _used_ratio(former):
                self.reports[key] = report
        for threshold in current_thresholds(tenant.policy, state, self._now):
            threshold_key = label, threshold.policy, str(threshold.percent)
            self.thresholds[threshold_key] = threshold.is_reached or self.thresholds.get(threshold_key, False)
        for kind, name in _KINDS:
            if kind in state.active_by_kind or tenant.can_submit(kind):
                self.active_tasks[label, name] += state.active_by_kind.get(kind, 0)
        for kind, sums in figures.spent.items():
            spent_key, (uses, fen) = (label, kind), current_spent(sums, self._spent_starts)
            if others := self.spent.get(spent_key):
                uses, fen = [*map(add, uses, others[0])], [*map(add, fen, others[1])]
            self.spent[spent_key] = uses, fen


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
