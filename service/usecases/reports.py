"""Quota, usage and submissions as reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum

import structlog
from msgspec import Struct, field

from service.domain import availability
from service.domain.errors import Conflict, FieldError, InvalidOptions, NotFound
from service.domain.ledger import (
    MAX_ACTIVE_POLICY,
    UNIT_MONEY,
    UNIT_TASKS,
    AccountState,
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
from service.domain.tasks import Cost, CostBasis, Kind, Task, TaskIdCodec
from service.domain.tenants import Tenant, Window
from service.telemetry.logging import fen_to_yuan
from service.usecases.ports import Ledger, RegistryView, TaskStore

UNIT_ACTIVE = "active"


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
    next_check_at: int | None


class RemainingQuota(Struct, frozen=True):
    """What is left in the old protocol's terms: uses, and money in fen; None where nobody knows."""

    count: int | None
    money_fen: int | None


class QuotaReports:
    """Reports on quota, from the ledger as it is now."""

    def __init__(self, *, ledger: Ledger, registry: RegistryView) -> None:
        self._ledger = ledger
        self._registry = registry

    async def for_tenant(self, tenant: Tenant) -> QuotaReport:
        """How the tenant's policies and accounts stand. Raises LedgerUnavailable."""
        snapshot = await self._ledger.tenant_snapshot(tenant.id)
        candidates = await self._load_candidates(tenant)
        kinds = [kind for kind in Kind if tenant.can_submit(kind)]
        outlooks = [
            availability.choose_account(candidates, tenant.policy.spending_mode, kind, snapshot.now) for kind in kinds
        ]
        waits = [at for chosen, at in outlooks if chosen is None and at is not None]
        can_pay = any(chosen for chosen, _ in outlooks)
        return QuotaReport(
            policies=report_policies(tenant, snapshot.state, snapshot.now),
            can_pay=can_pay,
            next_check_at=None if can_pay else min(waits, default=None),
        )

    async def remaining(self, tenant: Tenant) -> RemainingQuota:
        """The least that any policy leaves, or the account's figures where no policy limits it.

        Raises LedgerUnavailable.
        """
        snapshot = await self._ledger.tenant_snapshot(tenant.id)
        reports = report_policies(tenant, snapshot.state, snapshot.now)
        states = [candidate.state for candidate in await self._load_candidates(tenant)]
        return RemainingQuota(
            count=_min_remaining(reports, UNIT_TASKS, _sum_readings(states, "count")),
            money_fen=_min_remaining(reports, UNIT_MONEY, _sum_readings(states, "money")),
        )

    async def _load_candidates(self, tenant: Tenant) -> list[Candidate]:
        accounts = self._registry.current.accounts_of(tenant)
        states = await self._ledger.account_states([each.id for each in accounts])
        return [Candidate(each.id, each.policy, states[each.id]) for each in accounts]


def report_policies(tenant: Tenant, state: TenantState, now: int) -> tuple[PolicyReport, ...]:
    """How each policy of a tenant stands at `now`."""
    reports = []
    for limit in tenant.policy.limits:
        counter = current_counter(state, limit.window, now)
        resets_at = window_bounds(limit.window, now)[1]
        for unit, most, used, reserved, overrun in (
            (UNIT_TASKS, limit.tasks, counter.tasks, counter.tasks_reserved, None),
            (UNIT_MONEY, limit.money_fen, counter.money_fen, counter.money_reserved_fen, counter.overrun_fen),
        ):
            if most is not None:
                name, left = policy_name(limit.window, unit), compute_remaining(most, used, reserved)
                reports.append(PolicyReport(name, unit, limit.window, most, used, reserved, left, overrun, resets_at))
    most = tenant.policy.max_active
    if most is not None:
        left = compute_remaining(most, state.active_tasks, 0)
        reports.append(
            PolicyReport(MAX_ACTIVE_POLICY, UNIT_ACTIVE, None, most, state.active_tasks, 0, left, None, None)
        )
    return tuple(reports)


def _min_remaining(reports: tuple[PolicyReport, ...], unit: str, default: int | None) -> int | None:
    return min((each.remaining for each in reports if each.unit == unit), default=default)


def _sum_readings(states: list[AccountState], figure: str) -> int | None:
    known = [state.count if figure == "count" else state.money for state in states]
    values = [each.value for each in known if each]
    return sum(values) if values else None


MAX_DAYS = 400
"""How many days a report may span, and how far from today they may lie: older ones are not kept."""


_EPOCH = date(1970, 1, 1)


_KIND_ORDER = {kind: place for place, kind in enumerate(Kind)}


class Interval(StrEnum):
    """How long the period of a row is."""

    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


class Group(StrEnum):
    """What rows of one period are told apart by."""

    TENANT = "tenant"
    KIND = "kind"


class UsageQuery(Struct, frozen=True):
    """Which days, the first and the last included, and what becomes a row.

    Without a last day they go to today; without a first one they begin with the month of the last.
    """

    first: date | None = None
    last: date | None = None
    interval: Interval = Interval.DAY
    groups: tuple[Group, ...] = ()


class TenantRef(Struct, frozen=True):
    """A tenant by its id, which is never reused, and what it is or was called."""

    id: int
    name: str


class UsageRow(Struct, frozen=True):
    """What one period came to: a day, a month, or an interval of days, as ISO 8601 has them.

    Owner and kind are None where they are not told apart.
    """

    period: str
    tenant: TenantRef | None
    kind: Kind | None
    tally: Tally


class FlaggedSubmission(Struct, frozen=True):
    """A submission that the report names, and the day on which it was made."""

    submission: str
    tenant: TenantRef
    kind: Kind
    day: date


class UsageReport(Struct):
    """What was spent from `first` to `last`. There is no row for what nothing was submitted in.

    Submissions of unknown outcome are named, and those that were refunded.
    """

    first: date
    last: date
    interval: Interval
    groups: tuple[Group, ...]
    rows: Sequence[UsageRow] = ()
    total: Tally = field(default_factory=Tally)
    unknown: list[FlaggedSubmission] = field(default_factory=list)
    refunds: list[tuple[FlaggedSubmission, Refund]] = field(default_factory=list)


class UsageReports:
    """Reports on usage. Everything raises InvalidOptions for days that can't be reported on, or LedgerUnavailable."""

    def __init__(self, *, ledger: Ledger, registry: RegistryView) -> None:
        self._ledger = ledger
        self._registry = registry

    async def for_tenant(self, tenant: Tenant, query: UsageQuery) -> UsageReport:
        """The usage of one tenant."""
        return await self._build_report([TenantRef(tenant.id, tenant.name)], query)

    async def for_all_tenants(self, query: UsageQuery, name: str | None = None) -> UsageReport:
        """The usage of all tenants, or of those called `name`: deleted ones are among them. Raises InvalidOptions."""
        await self._registry.refresh()
        known = self._registry.current
        owners = [TenantRef(each.id, each.name) for each in known.tenants.values()]
        owners += [TenantRef(tenant_id, former) for tenant_id, former in known.deleted_tenant_names.items()]
        chosen = [owner for owner in owners if name in {None, owner.name}]
        if name is not None and not chosen:
            raise InvalidOptions([FieldError("tenant", "there is and was no tenant of this name")])
        return await self._build_report(chosen, query)

    async def _build_report(self, owners: Sequence[TenantRef], question: UsageQuery) -> UsageReport:
        first, last = _resolve_range(question, _EPOCH + timedelta(days=await self._ledger.current_day()))
        report = UsageReport(first, last, question.interval, question.groups)
        rows: dict[tuple[str, TenantRef | None, Kind | None], Tally] = {}
        days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
        for owner in sorted(owners, key=lambda each: (each.name, each.id)):
            for day, usage in zip(
                days, await self._ledger.get_usage(owner.id, [(day - _EPOCH).days for day in days]), strict=True
            ):
                _add_flagged(report, owner, day, usage)
                for kind, tally in usage.tallies.items():
                    row = (
                        _row_period(report, day),
                        owner if _groups_by_tenant(report) else None,
                        kind if _groups_by_kind(report) else None,
                    )
                    rows.setdefault(row, Tally()).update(tally)
                    report.total.update(tally)
        report.rows = [UsageRow(*row, tally) for row, tally in sorted(rows.items(), key=_row_order)]
        return report


def _resolve_range(question: UsageQuery, today: date) -> tuple[date, date]:
    """The first and the last day. Raises InvalidOptions."""
    oldest = today - timedelta(days=MAX_DAYS - 1)
    faults = [
        FieldError(name, f"must lie less than {MAX_DAYS} days from today, {today}: older usage is not kept")
        for name, day in (("from", question.first), ("to", question.last))
        if day and abs(day - today) >= timedelta(days=MAX_DAYS)
    ]
    last = question.last or today
    first = question.first or max(last.replace(day=1), oldest)
    if not faults and first > last:
        faults = [FieldError("from", f"must not be later than the last day, {last}")]
    elif not faults and last - first >= timedelta(days=MAX_DAYS):
        faults = [FieldError("from", f"must not lie more than {MAX_DAYS} days before the last day, {last}")]
    if faults:
        raise InvalidOptions(faults)
    return first, last


def _row_period(report: UsageReport, day: date) -> str:
    if report.interval is Interval.TOTAL:
        return f"{report.first}/{report.last}"
    return str(day) if report.interval is Interval.DAY else f"{day:%Y-%m}"


def _groups_by_tenant(report: UsageReport) -> bool:
    return Group.TENANT in report.groups


def _groups_by_kind(report: UsageReport) -> bool:
    return Group.KIND in report.groups


def _add_flagged(report: UsageReport, owner: TenantRef, day: date, usage: DayUsage) -> None:
    report.unknown += [FlaggedSubmission(name, owner, kind, day) for name, kind in sorted(usage.unknown.items())]
    report.refunds += [
        (FlaggedSubmission(name, owner, kind, day), refund) for name, (kind, refund) in sorted(usage.refunds.items())
    ]


def _row_order(row: tuple[tuple[str, TenantRef | None, Kind | None], Tally]) -> tuple[str, str, int, int]:
    (period, owner, kind), _ = row
    return period, owner.name if owner else "", owner.id if owner else 0, _KIND_ORDER[kind] if kind else 0


_log = structlog.get_logger(__name__)


_SUBMISSION_ID = re.compile(r"[0-9a-f]{32}")


class BalanceSuggestion(StrEnum):
    """What the balance suggests of a submission whose outcome is unknown."""

    CHARGED = "charged"
    NOT_CHARGED = "not-charged"
    UNKNOWN = "cannot-tell"


class SubmissionStatus(Struct, frozen=True):
    """What became of the submission `id`, and its task if it has one that is still known.

    `tenant` and `account` are their names; None for one that nobody remembers.
    """

    id: str
    reservation: Reservation
    task: Task | None
    tenant: str | None
    account: str | None

    @property
    def cost(self) -> Cost | None:
        """What it took, as far as it is known, or is held for it while nobody knows its outcome; None for nothing."""
        known = self.reservation
        if known.state is ReservationState.ACCEPTED:
            return known.cost or Cost(0, 0, CostBasis.UNKNOWN)
        if known.state is ReservationState.UNKNOWN:
            return Cost(0, known.money_holds.get(Window.DAY, 0), CostBasis.UNKNOWN)
        return None

    @property
    def balance_suggests(self) -> BalanceSuggestion | None:
        """Whether the account seems to have been charged; None if the outcome is known."""
        known = self.reservation
        if known.state is not ReservationState.UNKNOWN:
            return None
        return BalanceSuggestion(known.inferred_charge) if known.inferred_charge else BalanceSuggestion.UNKNOWN


class SubmissionReports:
    """Tells of submissions, and refunds them. Everything raises NotFound or LedgerUnavailable."""

    def __init__(self, *, ledger: Ledger, tasks: TaskStore, registry: RegistryView, task_ids: TaskIdCodec) -> None:
        self._ledger = ledger
        self._tasks = tasks
        self._registry = registry
        self._task_ids = task_ids

    async def for_tenant(self, tenant: Tenant, submission: str) -> SubmissionStatus:
        """What became of a submission of this tenant; that of another one is not found."""
        known = await self._load_reservation(submission)
        if known.tenant != tenant.id:
            raise _submission_not_found()
        return await self._build_status(submission, known)

    async def any_tenant(self, submission: str) -> SubmissionStatus:
        """What became of a submission of whichever tenant."""
        return await self._build_status(submission, await self._load_reservation(submission))

    def submission_of_task(self, task_id: str) -> str:
        """The id of the submission that became a task."""
        return self._task_ids.decode(task_id).reservation

    async def refund(self, submission: str, reason: str) -> SubmissionStatus:
        """Give what a submission was charged for back to the windows of its tenant, once.

        Raises Conflict if it was refunded before, has not ended, or cost nothing.
        """
        known = await self._load_reservation(submission)
        done = await self._ledger.refund(known.tenant, submission, reason)
        if done is None:
            raise _submission_not_found()
        became, known = done
        if became is RefundResult.ALREADY_REFUNDED and known.refund:
            raise Conflict(f"Submission {submission} {_describe_refund(known.refund)}")
        if became is RefundResult.RUNNING:
            raise Conflict(f"Submission {submission} has not ended, so that nobody knows yet what it costs. Try later.")
        if became is RefundResult.NOTHING_CHARGED:
            raise Conflict(f"Submission {submission} cost nothing: it is {known.state}.")
        fate = await self._build_status(submission, known)
        given = known.refund
        _log.info(
            "submission.refunded",
            tenant=fate.tenant,
            account=fate.account,
            reservation=submission,
            kind=known.kind,
            reason=reason,
            uses=given and given.count,
            yuan=given and fen_to_yuan(given.money_fen),
        )
        return fate

    async def _load_reservation(self, submission: str) -> Reservation:
        known = await self._ledger.get_reservation(submission) if _SUBMISSION_ID.fullmatch(submission) else None
        if known is None:
            raise _submission_not_found()
        return known

    async def _build_status(self, submission: str, known: Reservation) -> SubmissionStatus:
        found = await self._tasks.get(submission) if known.state is ReservationState.ACCEPTED else None
        registry = self._registry.current
        account = registry.account_by_id(known.account)
        return SubmissionStatus(
            id=submission,
            reservation=known,
            task=found[0] if found else None,
            tenant=registry.tenant_name(known.tenant),
            account=account.name if account else None,
        )


def _describe_refund(refund: Refund) -> str:
    at = datetime.fromtimestamp(refund.refunded_at // 1000, UTC).isoformat().replace("+00:00", "Z")
    return f"was refunded before, at {at}, with this reason: {refund.reason}"


def _submission_not_found() -> NotFound:
    return NotFound("There is no such submission.")
