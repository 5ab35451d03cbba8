"""What a tenant may still spend."""

from __future__ import annotations

from msgspec import Struct

from service.domain import availability
from service.domain.ledger import (
    COUNTED_MONEY,
    COUNTED_TASKS,
    MAX_ACTIVE,
    AccountState,
    Candidate,
    TenantState,
    compute_remaining,
    current_counter,
    period_of,
    policy_name,
)
from service.domain.tasks import Kind
from service.domain.tenants import Tenant, Window
from service.usecases.ports import Ledger, RegistryView

ACTIVE = "active"


class PolicyReport(Struct, frozen=True):
    """How a policy stands: in tasks, or in fen where `unit` is money; `resets_at` in milliseconds.

    `overrun` is what was spent beyond a limit on money, since a price is known only afterwards; None for tasks.
    """

    policy: str
    unit: str
    window: Window | None
    limit: int
    used: int
    reserved: int
    remaining: int
    overrun: int | None
    resets_at: int | None


class QuotaReport(Struct, frozen=True):
    """All policies of a tenant, and whether an account can pay now or when that is looked at again."""

    policies: tuple[PolicyReport, ...]
    can_pay: bool
    look_again: int | None


class Left(Struct, frozen=True):
    """What is left in the old protocol's terms: uses, and money in fen; None where nobody knows."""

    count: int | None
    money: int | None


class Quota:
    """Reports on quota, from the ledger as it is now."""

    def __init__(self, *, ledger: Ledger, registry: RegistryView) -> None:
        self._ledger = ledger
        self._registry = registry

    async def report(self, tenant: Tenant) -> QuotaReport:
        """How the tenant's policies and accounts stand. Raises LedgerUnavailable."""
        snapshot = await self._ledger.counters(tenant.id)
        candidates = await self._candidates(tenant)
        kinds = [kind for kind in Kind if tenant.may_submit(kind)]
        outlooks = [availability.choose(candidates, tenant.policy.purse, kind, snapshot.now) for kind in kinds]
        waits = [at for chosen, at in outlooks if chosen is None and at is not None]
        can_pay = any(chosen for chosen, _ in outlooks)
        return QuotaReport(
            policies=policies(tenant, snapshot.state, snapshot.now),
            can_pay=can_pay,
            look_again=None if can_pay else min(waits, default=None),
        )

    async def left(self, tenant: Tenant) -> Left:
        """The least that any policy leaves, or the account's figures where no policy limits it.

        Raises LedgerUnavailable.
        """
        snapshot = await self._ledger.counters(tenant.id)
        reports = policies(tenant, snapshot.state, snapshot.now)
        states = [candidate.state for candidate in await self._candidates(tenant)]
        return Left(
            count=_least(reports, COUNTED_TASKS, _sum(states, "count")),
            money=_least(reports, COUNTED_MONEY, _sum(states, "money")),
        )

    async def _candidates(self, tenant: Tenant) -> list[Candidate]:
        accounts = self._registry.current.accounts_of(tenant)
        states = await self._ledger.accounts([each.id for each in accounts])
        return [Candidate(each.id, each.policy, states[each.id]) for each in accounts]


def policies(tenant: Tenant, state: TenantState, now: int) -> tuple[PolicyReport, ...]:
    """How each policy of a tenant stands at `now`."""
    reports = []
    for limit in tenant.policy.limits:
        counter = current_counter(state, limit.window, now)
        resets_at = period_of(limit.window, now)[1]
        for unit, most, used, reserved, overrun in (
            (COUNTED_TASKS, limit.tasks, counter.tasks, counter.tasks_reserved, None),
            (COUNTED_MONEY, limit.money, counter.money, counter.money_reserved, counter.overrun),
        ):
            if most is not None:
                name, left = policy_name(limit.window, unit), compute_remaining(most, used, reserved)
                reports.append(PolicyReport(name, unit, limit.window, most, used, reserved, left, overrun, resets_at))
    most = tenant.policy.max_active
    if most is not None:
        left = compute_remaining(most, state.active, 0)
        reports.append(PolicyReport(MAX_ACTIVE, ACTIVE, None, most, state.active, 0, left, None, None))
    return tuple(reports)


def _least(reports: tuple[PolicyReport, ...], unit: str, otherwise: int | None) -> int | None:
    return min((each.remaining for each in reports if each.unit == unit), default=otherwise)


def _sum(states: list[AccountState], figure: str) -> int | None:
    known = [state.count if figure == "count" else state.money for state in states]
    values = [each.value for each in known if each]
    return sum(values) if values else None
