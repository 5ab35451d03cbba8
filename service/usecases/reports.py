"""Reports on quota, usage and submissions."""

from __future__ import annotations

import asyncio
import re
from calendar import monthrange
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum

import structlog
from msgspec import Struct, field

from service.crypto import TASK_ID_PREFIX, TaskIdCodec
from service.domain.availability import choose_account
from service.domain.errors import Conflict, FieldError, InvalidOptions, NotFound
from service.domain.ledger import (
    MAX_ACTIVE_POLICY,
    UNIT_MONEY,
    UNIT_TASKS,
    BalanceReading,
    Candidate,
    DayUsage,
    Refund,
    RefundResult,
    Reservation,
    ReservationState,
    Tally,
    TenantState,
    compute_remaining,
    current_counter,
    policy_name,
    window_bounds,
)
from service.domain.tasks import Cost, CostBasis, Kind, State, Task
from service.domain.tenants import Tenant, Window
from service.telemetry.logging import fen_to_yuan
from service.usecases.background import run_in_turns
from service.usecases.caches import CachedRegistry
from service.usecases.ports import Ledger, TaskStore

_log = structlog.get_logger(__name__)

UNIT_ACTIVE = "active"
MAX_DAYS = 400
"""The span of a report, and how far from today it may lie: older usage is not kept."""
_EPOCH = date(1970, 1, 1)
_READ_AT_ONCE = 4
"""Tenants whose usage is read at the same time: the script for a busy month takes a millisecond of Redis."""
_KIND_ORDER = {kind: index for index, kind in enumerate(Kind)}
_SUBMISSION_ID = re.compile(r"[0-9a-f]{32}")


class PolicyReport(Struct, frozen=True):
    """The state of a policy, in tasks, or in fen where `unit` is money; `resets_at` in milliseconds.

    `overrun` is the money spent beyond a limit, since prices are known only afterwards; None for tasks.
    """

    policy: str
    unit: str
    window: Window | None
    limit: int
    used: int
    reserved: int
    overrun: int | None
    resets_at: int | None

    @property
    def remaining(self) -> int:
        return compute_remaining(self.limit, self.used, self.reserved)


class QuotaReport(Struct, frozen=True):
    """All policies of a tenant, and whether an account can pay now, or when that is checked again."""

    policies: tuple[PolicyReport, ...]
    can_pay: bool
    next_check_at: int | None


class RemainingQuota(Struct, frozen=True):
    """The rest in terms of the old protocol; None if unknown."""

    count: int | None
    money_fen: int | None


@dataclass(kw_only=True, eq=False, repr=False)
class QuotaReports:
    ledger: Ledger
    registry: CachedRegistry

    async def for_tenant(self, tenant: Tenant) -> QuotaReport:
        """Report on a tenant's policies and accounts. Raises LedgerUnavailable."""
        snapshot = await self.ledger.tenant_snapshot(tenant.id)
        candidates = await self._load_candidates(tenant)
        kinds = [kind for kind in Kind if tenant.can_submit(kind)]
        spending_mode = tenant.policy.spending_mode
        choices = [choose_account(candidates, spending_mode, kind, snapshot.now) for kind in kinds]
        retry_times = [retry_at for chosen, retry_at in choices if chosen is None and retry_at is not None]
        can_pay = any(chosen for chosen, _ in choices)
        return QuotaReport(
            policies=report_policies(tenant, snapshot.state, snapshot.now),
            can_pay=can_pay,
            next_check_at=None if can_pay else min(retry_times, default=None),
        )

    async def list_policies(self, tenants: Sequence[Tenant]) -> Sequence[tuple[PolicyReport, ...]]:
        """Report on the policies of each of many tenants. Raises LedgerUnavailable."""
        figures, now = await self.ledger.tenant_figures([tenant.id for tenant in tenants])
        return await run_in_turns(report_policies(tenant, figures[tenant.id].state, now) for tenant in tenants)

    async def remaining(self, tenant: Tenant) -> RemainingQuota:
        """Return the least that a policy leaves, or the accounts' balance without one. Raises LedgerUnavailable."""
        snapshot = await self.ledger.tenant_snapshot(tenant.id)
        reports = report_policies(tenant, snapshot.state, snapshot.now)
        states = [candidate.state for candidate in await self._load_candidates(tenant)]
        return RemainingQuota(
            count=_min_remaining(reports, UNIT_TASKS, _sum_readings(state.count for state in states)),
            money_fen=_min_remaining(reports, UNIT_MONEY, _sum_readings(state.money for state in states)),
        )

    async def _load_candidates(self, tenant: Tenant) -> list[Candidate]:
        accounts = self.registry.current.accounts_of(tenant)
        states = await self.ledger.account_states([account.id for account in accounts])
        return [Candidate(account.id, account.policy, states[account.id]) for account in accounts]


def report_policies(tenant: Tenant, state: TenantState, now: int) -> tuple[PolicyReport, ...]:
    """Report on each policy of a tenant at `now`."""
    reports = []
    for limit in tenant.policy.limits:
        counter = current_counter(state, limit.window, now)
        resets_at = window_bounds(limit.window, now)[1]
        for unit, maximum, used, reserved, overrun in (
            (UNIT_TASKS, limit.tasks, counter.tasks, counter.tasks_reserved, None),
            (UNIT_MONEY, limit.money_fen, counter.money_fen, counter.money_reserved_fen, counter.overrun_fen),
        ):
            if maximum is not None:
                name = policy_name(limit.window, unit)
                reports.append(PolicyReport(name, unit, limit.window, maximum, used, reserved, overrun, resets_at))
    if (maximum := tenant.policy.max_active) is not None:
        reports.append(PolicyReport(MAX_ACTIVE_POLICY, UNIT_ACTIVE, None, maximum, state.active_tasks, 0, None, None))
    return tuple(reports)


def _min_remaining(reports: tuple[PolicyReport, ...], unit: str, default: int | None) -> int | None:
    return min((report.remaining for report in reports if report.unit == unit), default=default)


def _sum_readings(readings: Iterable[BalanceReading | None]) -> int | None:
    values = [reading.value for reading in readings if reading]
    return sum(values) if values else None


class Interval(StrEnum):
    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


class Group(StrEnum):
    """A grouping of rows within one period."""

    TENANT = "tenant"
    KIND = "kind"


class UsageQuery(Struct, frozen=True):
    """Days, first and last included, and grouping. Defaults: to today, from the first of that month."""

    first: date | None = None
    last: date | None = None
    interval: Interval = Interval.DAY
    groups: tuple[Group, ...] = ()


class TenantRef(Struct, frozen=True):
    """A tenant's id, which is never reused, and its (former) name."""

    id: int
    name: str


class UsageRow(Struct, frozen=True):
    """Usage of one period (a day, a month or an interval in ISO 8601); None where rows are not grouped."""

    period: str
    tenant: TenantRef | None
    kind: Kind | None
    tally: Tally


class FlaggedSubmission(Struct, frozen=True):
    """A submission that a report names, with its day."""

    submission: str
    tenant: TenantRef
    kind: Kind
    day: date


class UsageReport(Struct):
    """Usage from `first` to `last`, without empty rows; unknown and refunded submissions are named."""

    first: date
    last: date
    interval: Interval
    groups: tuple[Group, ...]
    rows: Sequence[UsageRow] = ()
    total: Tally = field(default_factory=Tally)
    unknown: list[FlaggedSubmission] = field(default_factory=list)
    refunds: list[tuple[FlaggedSubmission, Refund]] = field(default_factory=list)


@dataclass(kw_only=True, eq=False, repr=False)
class UsageReports:
    """Reports on usage. Everything raises InvalidOptions for unavailable days, or LedgerUnavailable."""

    ledger: Ledger
    registry: CachedRegistry

    async def for_tenant(self, tenant: Tenant, query: UsageQuery) -> UsageReport:
        return await self._build_report([TenantRef(tenant.id, tenant.name)], query)

    async def for_all_tenants(self, query: UsageQuery, name: str | None = None) -> UsageReport:
        """Report on all tenants, or on those named `name`, deleted ones included. Raises InvalidOptions."""
        await self.registry.refresh()
        registry = self.registry.current
        owners = [TenantRef(tenant.id, tenant.name) for tenant in registry.tenants.values()]
        owners += [
            TenantRef(tenant_id, deleted_name) for tenant_id, deleted_name in registry.deleted_tenant_names.items()
        ]
        selected = [owner for owner in owners if name in {None, owner.name}]
        if name is not None and not selected:
            raise InvalidOptions([FieldError("tenant", "there is and was no tenant of this name")])
        return await self._build_report(selected, query)

    async def _build_report(self, owners: Sequence[TenantRef], query: UsageQuery) -> UsageReport:
        first, last = _resolve_range(query, _EPOCH + timedelta(days=await self.ledger.current_day()))
        report = UsageReport(first, last, query.interval, query.groups)
        rows: dict[tuple[str, TenantRef | None, Kind | None], Tally] = {}
        owners = sorted(owners, key=lambda tenant: (tenant.name, tenant.id))
        for start in range(0, len(owners), _READ_AT_ONCE):
            batch = owners[start : start + _READ_AT_ONCE]
            for owner, usages in zip(
                batch, await asyncio.gather(*(self._read_usage(owner.id, report) for owner in batch)), strict=True
            ):
                for day, usage in usages.items():
                    _add_usage(report, rows, owner, _EPOCH + timedelta(days=day), usage)
        report.rows = [UsageRow(*row, tally) for row, tally in sorted(rows.items(), key=_row_order)]
        for row in report.rows:
            report.total.update(row.tally)
        return report

    async def _read_usage(self, tenant: int, report: UsageReport) -> Mapping[int, DayUsage]:
        """Read the usage by day; unless rows are days, with the tallies of a month for its first day."""
        first, last = (report.first - _EPOCH).days, (report.last - _EPOCH).days
        if report.interval is Interval.DAY:
            days = range(first, last + 1)
            return dict(zip(days, await self.ledger.get_usage(tenant, days), strict=True))
        usages: dict[int, DayUsage] = {}
        while first <= last:
            day = _EPOCH + timedelta(days=first)
            month_end = first + monthrange(day.year, day.month)[1] - day.day
            usages |= await self.ledger.sum_usage(tenant, first, min(month_end, last))
            first = month_end + 1
        return dict(sorted(usages.items()))


def _add_usage(
    report: UsageReport,
    rows: dict[tuple[str, TenantRef | None, Kind | None], Tally],
    owner: TenantRef,
    day: date,
    usage: DayUsage,
) -> None:
    for name, kind in sorted(usage.unknown.items()):
        report.unknown.append(FlaggedSubmission(name, owner, kind, day))
    for name, (kind, refund) in sorted(usage.refunds.items()):
        report.refunds.append((FlaggedSubmission(name, owner, kind, day), refund))
    for kind, tally in usage.tallies.items():
        row = (
            _row_period(report, day),
            owner if Group.TENANT in report.groups else None,
            kind if Group.KIND in report.groups else None,
        )
        rows.setdefault(row, Tally()).update(tally)


def _resolve_range(query: UsageQuery, today: date) -> tuple[date, date]:
    oldest = today - timedelta(days=MAX_DAYS - 1)
    errors = [
        FieldError(name, f"must lie less than {MAX_DAYS} days from today, {today}: older usage is not kept")
        for name, day in (("from", query.first), ("to", query.last))
        if day and abs(day - today) >= timedelta(days=MAX_DAYS)
    ]
    last = query.last or today
    first = query.first or max(last.replace(day=1), oldest)
    if not errors and first > last:
        errors = [FieldError("from", f"must not be later than the last day, {last}")]
    elif not errors and last - first >= timedelta(days=MAX_DAYS):
        errors = [FieldError("from", f"must not lie more than {MAX_DAYS} days before the last day, {last}")]
    if errors:
        raise InvalidOptions(errors)
    return first, last


def _row_period(report: UsageReport, day: date) -> str:
    if report.interval is Interval.TOTAL:
        return f"{report.first}/{report.last}"
    return str(day) if report.interval is Interval.DAY else f"{day:%Y-%m}"


def _row_order(row: tuple[tuple[str, TenantRef | None, Kind | None], Tally]) -> tuple[str, str, int, int]:
    (period, owner, kind), _ = row
    return period, owner.name if owner else "", owner.id if owner else 0, _KIND_ORDER[kind] if kind else 0


class BalanceSuggestion(StrEnum):
    """Inference from the balance for a submission of unknown outcome, as contracted."""

    CHARGED = "charged"
    NOT_CHARGED = "not-charged"
    UNKNOWN = "cannot-tell"


class SubmissionStatus(Struct, frozen=True):
    """The state of a submission; tenant and account by name, None if unknown."""

    id: str
    reservation: Reservation
    task: Task | None
    tenant: str | None
    account: str | None

    @property
    def cost(self) -> Cost | None:
        """Its known cost, or what is held while the outcome is unknown; None for nothing."""
        reservation = self.reservation
        if reservation.state is ReservationState.ACCEPTED:
            return reservation.cost or Cost(0, 0, CostBasis.UNKNOWN)
        if reservation.state is ReservationState.UNKNOWN:
            return Cost(0, reservation.money_holds.get(Window.DAY, 0), CostBasis.UNKNOWN)
        return None

    @property
    def balance_suggests(self) -> BalanceSuggestion | None:
        """Whether the account was charged, by its balance; None if the outcome is known."""
        reservation = self.reservation
        if reservation.state is not ReservationState.UNKNOWN:
            return None
        return (
            BalanceSuggestion(reservation.inferred_charge) if reservation.inferred_charge else BalanceSuggestion.UNKNOWN
        )


class TaskReport(Struct, frozen=True):
    """A task as it is stored; tenant and account by name, None if unknown."""

    task: Task
    tenant: str | None
    account: str | None


@dataclass(kw_only=True, eq=False, repr=False)
class SubmissionReports:
    """Reports on submissions and their tasks, and refunds. Everything raises NotFound or LedgerUnavailable."""

    ledger: Ledger
    tasks: TaskStore
    registry: CachedRegistry
    task_ids: TaskIdCodec

    async def for_tenant(self, tenant: Tenant, submission: str) -> SubmissionStatus:
        reservation = await self._load_reservation(submission)
        if reservation.tenant != tenant.id:
            raise _submission_not_found()
        return await self._build_status(submission, reservation)

    async def any_tenant(self, task_or_submission: str) -> SubmissionStatus:
        submission = self.resolve_submission_id(task_or_submission)
        return await self._build_status(submission, await self._load_reservation(submission))

    def resolve_submission_id(self, task_or_submission: str) -> str:
        """Return the submission id of a task id; any other id is returned unchanged."""
        if task_or_submission.startswith(TASK_ID_PREFIX):
            return self.task_ids.decode(task_or_submission).reservation
        return task_or_submission

    async def read_task(self, task_or_submission: str) -> TaskReport:
        """Read a task of any tenant without scheduling a check of it."""
        submission = self.resolve_submission_id(task_or_submission)
        stored = await self.tasks.get(submission) if _SUBMISSION_ID.fullmatch(submission) else None
        if stored is None:
            raise NotFound("There is no such task.")
        return self._build_task_report(stored[0])

    async def list_tasks(
        self, tenant: str, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> tuple[Sequence[TaskReport], str | None]:
        """List the tasks of a tenant by name, or of the last deleted one of this name, newest first.

        Also returns the cursor of the next page. Raises MalformedRequest for an invalid cursor.
        """
        await self.registry.refresh()
        registry = self.registry.current
        existing = registry.tenants.get(tenant)
        deleted_ids = [deleted for deleted, name in registry.deleted_tenant_names.items() if name == tenant]
        if not existing and not deleted_ids:
            raise NotFound("There is and was no tenant of this name.")
        tenant_id = existing.id if existing else max(deleted_ids)
        page = await self.tasks.list_page(tenant_id, state=state, kind=kind, limit=limit, cursor=cursor)
        return [self._build_task_report(task) for task in page.tasks], page.next_cursor

    async def refund(self, task_or_submission: str, reason: str) -> SubmissionStatus:
        """Refund a submission to its tenant's windows, once.

        Raises Conflict if it was refunded before, has not ended, or cost nothing.
        """
        submission = self.resolve_submission_id(task_or_submission)
        reservation = await self._load_reservation(submission)
        result = await self.ledger.refund(reservation.tenant, submission, reason)
        if result is None:
            raise _submission_not_found()
        outcome, reservation = result
        if outcome is RefundResult.ALREADY_REFUNDED and reservation.refund:
            refunded_at = datetime.fromtimestamp(reservation.refund.refunded_at // 1000, UTC)
            time = refunded_at.isoformat().replace("+00:00", "Z")
            raise Conflict(
                f"Submission {submission} was refunded before, at {time}, with this reason: {reservation.refund.reason}"
            )
        if outcome is RefundResult.RUNNING:
            raise Conflict(f"Submission {submission} has not ended, so its cost is unknown. Try later.")
        if outcome is RefundResult.NOTHING_CHARGED:
            raise Conflict(f"Submission {submission} cost nothing: it is {reservation.state}.")
        status = await self._build_status(submission, reservation)
        refund = reservation.refund
        _log.info(
            "submission.refunded",
            tenant=status.tenant,
            account=status.account,
            reservation=submission,
            kind=reservation.kind,
            reason=reason,
            uses=refund and refund.count,
            yuan=refund and fen_to_yuan(refund.money_fen),
        )
        return status

    async def _load_reservation(self, submission: str) -> Reservation:
        reservation = await self.ledger.get_reservation(submission) if _SUBMISSION_ID.fullmatch(submission) else None
        if reservation is None:
            raise _submission_not_found()
        return reservation

    async def _build_status(self, submission: str, reservation: Reservation) -> SubmissionStatus:
        stored = await self.tasks.get(submission) if reservation.state is ReservationState.ACCEPTED else None
        return SubmissionStatus(
            id=submission,
            reservation=reservation,
            task=stored[0] if stored else None,
            tenant=self.registry.current.tenant_name(reservation.tenant),
            account=self.registry.current.account_name(reservation.account),
        )

    def _build_task_report(self, task: Task) -> TaskReport:
        registry = self.registry.current
        return TaskReport(task, registry.tenant_name(task.tenant), registry.account_name(task.account))


def _submission_not_found() -> NotFound:
    return NotFound("There is no such submission.")
