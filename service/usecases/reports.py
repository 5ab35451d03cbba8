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
    COUNTED_MONEY,
    COUNTED_TASKS,
    MAX_ACTIVE,
    AccountState,
    Candidate,
    DayUsage,
    Refund,
    Refunding,
    Reservation,
    ReservationState,
    Tally,
    TenantState,
    compute_remaining,
    current_counter,
    period_of,
    policy_name,
)
from service.domain.tasks import Basis, Cost, Kind, Task, TaskIds
from service.domain.tenants import Tenant, Window
from service.telemetry.logging import yuan
from service.usecases.ports import Books, Ledger, RegistryView, Tasks

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


MOST_DAYS = 400
"""How many days a report may span, and how far from today they may lie: older ones are not kept."""


_EPOCH = date(1970, 1, 1)


_KINDS = {kind: place for place, kind in enumerate(Kind)}


class Interval(StrEnum):
    """How long the period of a row is."""

    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


class Group(StrEnum):
    """What rows of one period are told apart by."""

    TENANT = "tenant"
    KIND = "kind"


class Question(Struct, frozen=True):
    """Which days, the first and the last included, and what becomes a row.

    Without a last day they go to today; without a first one they begin with the month of the last.
    """

    first: date | None = None
    last: date | None = None
    interval: Interval = Interval.DAY
    groups: tuple[Group, ...] = ()


class Owner(Struct, frozen=True):
    """A tenant by its id, which is never reused, and what it is or was called."""

    id: int
    name: str


class Row(Struct, frozen=True):
    """What one period came to: a day, a month, or an interval of days, as ISO 8601 has them.

    Owner and kind are None where they are not told apart.
    """

    period: str
    owner: Owner | None
    kind: Kind | None
    tally: Tally


class Marked(Struct, frozen=True):
    """A submission that the report names, and the day on which it was made."""

    submission: str
    owner: Owner
    kind: Kind
    day: date


class Report(Struct):
    """What was spent from `first` to `last`. There is no row for what nothing was submitted in.

    Submissions of unknown outcome are named, and those that were refunded.
    """

    first: date
    last: date
    interval: Interval
    groups: tuple[Group, ...]
    rows: Sequence[Row] = ()
    total: Tally = field(default_factory=Tally)
    unknown: list[Marked] = field(default_factory=list)
    refunds: list[tuple[Marked, Refund]] = field(default_factory=list)


class Usage:
    """Reports on usage. Everything raises InvalidOptions for days that can't be reported on, or LedgerUnavailable."""

    def __init__(self, *, books: Books, registry: RegistryView) -> None:
        self._books = books
        self._registry = registry

    async def of(self, tenant: Tenant, question: Question) -> Report:
        """The usage of one tenant."""
        return await self._report([Owner(tenant.id, tenant.name)], question)

    async def of_all(self, question: Question, name: str | None = None) -> Report:
        """The usage of all tenants, or of those called `name`: deleted ones are among them. Raises InvalidOptions."""
        await self._registry.refresh()
        known = self._registry.current
        owners = [Owner(each.id, each.name) for each in known.tenants.values()]
        owners += [Owner(tenant_id, former) for tenant_id, former in known.former.items()]
        chosen = [owner for owner in owners if name in {None, owner.name}]
        if name is not None and not chosen:
            raise InvalidOptions([FieldError("tenant", "there is and was no tenant of this name")])
        return await self._report(chosen, question)

    async def _report(self, owners: Sequence[Owner], question: Question) -> Report:
        first, last = _range(question, _EPOCH + timedelta(days=await self._books.today()))
        report = Report(first, last, question.interval, question.groups)
        rows: dict[tuple[str, Owner | None, Kind | None], Tally] = {}
        days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
        for owner in sorted(owners, key=lambda each: (each.name, each.id)):
            for day, usage in zip(
                days, await self._books.usage(owner.id, [(day - _EPOCH).days for day in days]), strict=True
            ):
                _mark(report, owner, day, usage)
                for kind, tally in usage.tallies.items():
                    row = (
                        _period(report, day),
                        owner if _by_tenant(report) else None,
                        kind if _by_kind(report) else None,
                    )
                    rows.setdefault(row, Tally()).update(tally)
                    report.total.update(tally)
        report.rows = [Row(*row, tally) for row, tally in sorted(rows.items(), key=_place)]
        return report


def _range(question: Question, today: date) -> tuple[date, date]:
    """The first and the last day. Raises InvalidOptions."""
    oldest = today - timedelta(days=MOST_DAYS - 1)
    faults = [
        FieldError(name, f"must lie less than {MOST_DAYS} days from today, {today}: older usage is not kept")
        for name, day in (("from", question.first), ("to", question.last))
        if day and abs(day - today) >= timedelta(days=MOST_DAYS)
    ]
    last = question.last or today
    first = question.first or max(last.replace(day=1), oldest)
    if not faults and first > last:
        faults = [FieldError("from", f"must not be later than the last day, {last}")]
    elif not faults and last - first >= timedelta(days=MOST_DAYS):
        faults = [FieldError("from", f"must not lie more than {MOST_DAYS} days before the last day, {last}")]
    if faults:
        raise InvalidOptions(faults)
    return first, last


def _period(report: Report, day: date) -> str:
    if report.interval is Interval.TOTAL:
        return f"{report.first}/{report.last}"
    return str(day) if report.interval is Interval.DAY else f"{day:%Y-%m}"


def _by_tenant(report: Report) -> bool:
    return Group.TENANT in report.groups


def _by_kind(report: Report) -> bool:
    return Group.KIND in report.groups


def _mark(report: Report, owner: Owner, day: date, usage: DayUsage) -> None:
    report.unknown += [Marked(name, owner, kind, day) for name, kind in sorted(usage.unknown.items())]
    report.refunds += [
        (Marked(name, owner, kind, day), refund) for name, (kind, refund) in sorted(usage.refunds.items())
    ]


def _place(row: tuple[tuple[str, Owner | None, Kind | None], Tally]) -> tuple[str, str, int, int]:
    (period, owner, kind), _ = row
    return period, owner.name if owner else "", owner.id if owner else 0, _KINDS[kind] if kind else 0


_log = structlog.get_logger(__name__)


_ID = re.compile(r"[0-9a-f]{32}")


class BalanceSuggestion(StrEnum):
    """What the balance suggests of a submission whose outcome is unknown."""

    CHARGED = "charged"
    NOT_CHARGED = "not-charged"
    CANNOT_TELL = "cannot-tell"


class Fate(Struct, frozen=True):
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
            return known.cost or Cost(0, 0, Basis.UNKNOWN)
        if known.state is ReservationState.UNKNOWN:
            return Cost(0, known.holds.get(Window.DAY, 0), Basis.UNKNOWN)
        return None

    @property
    def balance_suggests(self) -> BalanceSuggestion | None:
        """Whether the account seems to have been charged; None if the outcome is known."""
        known = self.reservation
        if known.state is not ReservationState.UNKNOWN:
            return None
        return BalanceSuggestion(known.suggests) if known.suggests else BalanceSuggestion.CANNOT_TELL


class Submissions:
    """Tells of submissions, and refunds them. Everything raises NotFound or LedgerUnavailable."""

    def __init__(self, *, books: Books, tasks: Tasks, registry: RegistryView, task_ids: TaskIds) -> None:
        self._books = books
        self._tasks = tasks
        self._registry = registry
        self._task_ids = task_ids

    async def of(self, tenant: Tenant, submission: str) -> Fate:
        """What became of a submission of this tenant; that of another one is not found."""
        known = await self._known(submission)
        if known.tenant != tenant.id:
            raise _not_found()
        return await self._fate(submission, known)

    async def of_any(self, submission: str) -> Fate:
        """What became of a submission of whichever tenant."""
        return await self._fate(submission, await self._known(submission))

    def of_task(self, task_id: str) -> str:
        """The id of the submission that became a task."""
        return self._task_ids.open(task_id).reservation

    async def refund(self, submission: str, reason: str) -> Fate:
        """Give what a submission was charged for back to the windows of its tenant, once.

        Raises Conflict if it was refunded before, has not ended, or cost nothing.
        """
        known = await self._known(submission)
        done = await self._books.refund(known.tenant, submission, reason)
        if done is None:
            raise _not_found()
        became, known = done
        if became is Refunding.AGAIN and known.refund:
            raise Conflict(f"Submission {submission} {_refunded(known.refund)}")
        if became is Refunding.RUNNING:
            raise Conflict(f"Submission {submission} has not ended, so that nobody knows yet what it costs. Try later.")
        if became is Refunding.FREE:
            raise Conflict(f"Submission {submission} cost nothing: it is {known.state}.")
        fate = await self._fate(submission, known)
        given = known.refund
        _log.info(
            "submission.refunded",
            tenant=fate.tenant,
            account=fate.account,
            reservation=submission,
            kind=known.kind,
            reason=reason,
            uses=given and given.count,
            yuan=given and yuan(given.money),
        )
        return fate

    async def _known(self, submission: str) -> Reservation:
        known = await self._books.submission(submission) if _ID.fullmatch(submission) else None
        if known is None:
            raise _not_found()
        return known

    async def _fate(self, submission: str, known: Reservation) -> Fate:
        found = await self._tasks.get(submission) if known.state is ReservationState.ACCEPTED else None
        registry = self._registry.current
        account = registry.account(known.account)
        return Fate(
            id=submission,
            reservation=known,
            task=found[0] if found else None,
            tenant=registry.tenant_name(known.tenant),
            account=account.name if account else None,
        )


def _refunded(refund: Refund) -> str:
    at = datetime.fromtimestamp(refund.at // 1000, UTC).isoformat().replace("+00:00", "Z")
    return f"was refunded before, at {at}, with this reason: {refund.reason}"


def _not_found() -> NotFound:
    return NotFound("There is no such submission.")
