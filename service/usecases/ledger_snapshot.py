"""The numbers that `/metrics` shows of the ledger."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping

import structlog

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import COUNTED_MONEY, AccountState, TenantState, current_counter
from service.domain.tasks import Kind
from service.domain.tenants import Registry, Tenant, Window
from service.telemetry.gauges import AccountStanding, QuotaStanding, Seen
from service.telemetry.metrics import Metrics
from service.usecases.ports import Agenda, Ledger, RegistryView, Tasks
from service.usecases.reports import PolicyReport, policies

_log = structlog.get_logger(__name__)


SURVEY_SECONDS = 3.0
"""A look takes no longer: a scrape without the ledger tells more than one that Prometheus gave up."""


_SHOWN = (Window.DAY, Window.MONTH, Window.TOTAL)


_YUAN = "yuan"


class Survey:
    """Has the metrics show the ledger as it is."""

    def __init__(
        self, *, ledger: Ledger, tasks: Tasks, agenda: Agenda, registry: RegistryView, metrics: Metrics
    ) -> None:
        self._ledger = ledger
        self._tasks = tasks
        self._agenda = agenda
        self._registry = registry
        self._metrics = metrics
        self._looking: asyncio.Task[None] | None = None

    async def __call__(self) -> None:
        """Look now, or share the look that is under way. Never raises: what can't be seen is not shown."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        await asyncio.shield(self._looking)

    async def _look(self) -> None:
        self._metrics.refresh()
        seen = None
        try:
            async with asyncio.timeout(SURVEY_SECONDS):
                seen = await self._seen(self._registry.current)
        except (LedgerUnavailable, TimeoutError):
            pass  # the metrics say so
        except Exception:  # noqa: BLE001 - all other metrics can be shown
            _log.exception("survey.crashed")
        self._metrics.standing.show(seen)

    async def _seen(self, registry: Registry) -> Seen:
        tenants = tuple(registry.tenants.values())
        states, now = await self._ledger.counters_of([each.id for each in tenants])
        accounts = await self._ledger.accounts([each.id for each in registry.accounts.values()])
        webhooks, failed = await self._agenda.backlog()
        return Seen(
            tenants=len(tenants),
            quotas=self._quotas(tenants, states, now),
            active=self._active(tenants, states),
            spent=self._spent(tenants, states, now),
            accounts=[
                AccountStanding(each.name, each.policy, accounts.get(each.id, AccountState()), now)
                for each in registry.accounts.values()
            ],
            watch=await self._tasks.backlog(),
            webhooks=webhooks,
            webhooks_failed=failed,
            clock_offset=await self._ledger.clock_offset(),
        )

    def _quotas(
        self, tenants: tuple[Tenant, ...], states: Mapping[int, TenantState], now: int
    ) -> tuple[QuotaStanding, ...]:
        """Each policy of each tenant; of those that share a name, the one that is nearest to its limit."""
        found: dict[tuple[str, str], PolicyReport] = {}
        for tenant in tenants:
            for report in policies(tenant, states[tenant.id], now):
                key = self._metrics.tenant(tenant.id), report.policy
                found[key] = max(found.get(key, report), report, key=_burnt)
        return tuple(_standing(tenant, report) for (tenant, _), report in found.items())

    def _active(self, tenants: tuple[Tenant, ...], states: Mapping[int, TenantState]) -> Mapping[tuple[str, str], int]:
        found: Counter[tuple[str, str]] = Counter()
        for tenant in tenants:
            name, kinds = self._metrics.tenant(tenant.id), states[tenant.id].kinds
            for kind in Kind:
                if kind in kinds or tenant.may_submit(kind):
                    found[name, kind.value] += kinds.get(kind, 0)
        return found

    def _spent(
        self, tenants: tuple[Tenant, ...], states: Mapping[int, TenantState], now: int
    ) -> Mapping[tuple[str, str], int]:
        found: Counter[tuple[str, str]] = Counter()
        for tenant in tenants:
            for window in _SHOWN:
                money = current_counter(states[tenant.id], window, now).money
                found[self._metrics.tenant(tenant.id), window.value] += money
        return found


def _burnt(report: PolicyReport) -> float:
    """The share of a limit that is used or held; a limit of zero is always reached."""
    return (report.used + report.reserved) / report.limit if report.limit else 1.0


def _standing(tenant: str, report: PolicyReport) -> QuotaStanding:
    money = report.unit == COUNTED_MONEY
    scale = 100 if money else 1
    return QuotaStanding(
        tenant=tenant,
        policy=report.policy,
        unit=_YUAN if money else report.unit,
        used=report.used / scale,
        reserved=report.reserved / scale,
        limit=report.limit / scale,
    )
