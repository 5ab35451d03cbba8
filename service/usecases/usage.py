"""What was spent: by one tenant or by all, in periods of UTC days.

A row counts what the days of its period counted, so that its sums are those of the tenants' windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from enum import StrEnum

from msgspec import Struct, field

from service.domain.errors import FieldError, InvalidOptions
from service.domain.ledger import DayUsage, Refund, Tally
from service.domain.tasks import Kind
from service.domain.tenants import Tenant
from service.usecases.ports import Books, RegistryView

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
