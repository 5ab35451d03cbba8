"""What callers see of usage: money in yuan, and the same figures in JSON and in CSV."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from service.api.tabular import flat
from service.api.views import AmountView, Yuan, moment, yuan
from service.domain.ledger import Measure, Refund, Tally, charged_money, charged_tasks
from service.domain.tasks import Kind
from service.usecases.reports import Group, Interval, Marked, Report, Row

Uses = Annotated[int, Meta(description="Prepaid uses.")]
Day = Annotated[date, Meta(description="When it was submitted.")]


class OutcomesView(Struct, frozen=True):
    """Submissions by what became of them."""

    running: int
    succeeded: int
    failed: int
    unknown: Annotated[int, Meta(description="Sent, but not answered usably: they may have been charged.")]
    refused: Annotated[int, Meta(description="By the upstream, at no cost.")]
    not_sent: Annotated[int, Meta(description="As the upstream could not be reached, at no cost.")]


class ChargedView(Struct, frozen=True):
    """What the tenant's limits count of them: less than was spent, where something was refunded."""

    tasks: int
    money: Yuan


class UnclearView(Struct, frozen=True):
    """What nobody knows."""

    tasks: Annotated[int, Meta(description="Ended tasks of unknown cost.")]
    money: Annotated[int | float, Meta(description="In yuan, held for submissions of unknown outcome.")]


class SpendingView(Struct, frozen=True):
    """What they took from the accounts, refunded or not, by how that is known."""

    observed: Annotated[AmountView, Meta(description="Seen in the balance.")]
    estimated: Annotated[AmountView, Meta(description="Taken from an earlier price.")]
    unknown: UnclearView


class RefundedView(Struct, frozen=True):
    """What operators gave back of it."""

    tasks: int
    count: Uses
    money: Yuan


class UsageSumView(Struct, frozen=True):
    """What all submissions came to."""

    tasks: OutcomesView
    charged: ChargedView
    spent: SpendingView
    refunded: RefundedView


class UsageRowView(Struct, frozen=True, kw_only=True):
    """What the submissions of one period came to. Each belongs to the period in which it was submitted."""

    period: Annotated[
        str,
        Meta(
            description="A day, a month or the whole interval, as ISO 8601 has them.",
            examples=["2026-01-31", "2026-01", "2026-01-01/2026-01-31"],
        ),
    ]
    tenant: Annotated[str | None, Meta(description="For operators; null unless grouped by.")] | UnsetType = UNSET
    tenant_id: Annotated[int | None, Meta(description="Never reused, as names can be.")] | UnsetType = UNSET
    kind: Annotated[Kind | None, Meta(description="Null unless grouped by.")]
    tasks: OutcomesView
    charged: ChargedView
    spent: SpendingView
    refunded: RefundedView


class UnknownSubmissionView(Struct, frozen=True, kw_only=True):
    """A submission of unknown outcome."""

    id: Annotated[str, Meta(description="The `submission_id`.")]
    tenant: Annotated[str, Meta(description="For operators.")] | UnsetType = UNSET
    tenant_id: Annotated[int, Meta(description="For operators.")] | UnsetType = UNSET
    kind: Kind
    day: Day


class RefundedSubmissionView(Struct, frozen=True, kw_only=True):
    """A submission whose cost was given back to the windows of its tenant."""

    submission: Annotated[str, Meta(description="The `submission_id`.")]
    tenant: Annotated[str, Meta(description="For operators.")] | UnsetType = UNSET
    tenant_id: Annotated[int, Meta(description="For operators.")] | UnsetType = UNSET
    kind: Kind
    day: Day
    count: Uses
    money: Yuan
    reason: str
    refunded_at: datetime


class UsageView(Struct, frozen=True, rename={"first": "from", "last": "to"}):
    """What was spent from one day to another, both included, in UTC. Rows with nothing to count are left out."""

    first: date
    last: date
    interval: Interval
    group_by: list[Group]
    items: list[UsageRowView]
    total: UsageSumView
    unknown_submissions: list[UnknownSubmissionView]
    refunds: Annotated[list[RefundedSubmissionView], Meta(description="Of what was submitted on these days.")]


def usage_view(report: Report, *, for_operators: bool) -> UsageView:
    """A report as JSON shows it; only operators are told of tenants."""
    unknown = [
        UnknownSubmissionView(id=each.submission, kind=each.kind, day=each.day, **_tenant(each, for_operators))
        for each in report.unknown
    ]
    return UsageView(
        first=report.first,
        last=report.last,
        interval=report.interval,
        group_by=list(report.groups),
        items=[_row(row, for_operators) for row in report.rows],
        total=UsageSumView(**_sums(report.total)),
        unknown_submissions=unknown,
        refunds=[_refunded(marked, refund, for_operators) for marked, refund in report.refunds],
    )


def usage_table(report: Report, *, for_operators: bool) -> tuple[list[str], list[list[Any]]]:
    """The rows of a report as CSV shows them, under the names they have in JSON."""
    head = flat(msgspec.to_builtins(_row(_NO_ROW, for_operators)))
    rows = [flat(msgspec.to_builtins(_row(row, for_operators))) for row in report.rows]
    return list(head), [list(row.values()) for row in rows]


_NO_ROW = Row(period="", owner=None, kind=None, tally=Tally())


def _row(row: Row, for_operators: bool) -> UsageRowView:
    return UsageRowView(period=row.period, kind=row.kind, **_sums(row.tally), **_tenant(row, for_operators))


def _tenant(whose: Row | Marked, for_operators: bool) -> dict[str, Any]:
    if not for_operators:
        return {}
    owner = whose.owner
    return {"tenant": owner and owner.name, "tenant_id": owner and owner.id}


def _refunded(marked: Marked, refund: Refund, for_operators: bool) -> RefundedSubmissionView:
    return RefundedSubmissionView(
        submission=marked.submission,
        kind=marked.kind,
        day=marked.day,
        count=refund.count,
        money=yuan(refund.money),
        reason=refund.reason,
        refunded_at=moment(refund.at),
        **_tenant(marked, for_operators),
    )


def _sums(tally: Tally) -> dict[str, Any]:
    return {
        "tasks": OutcomesView(
            running=tally[Measure.RUNNING],
            succeeded=tally[Measure.SUCCEEDED],
            failed=tally[Measure.FAILED],
            unknown=tally[Measure.UNKNOWN],
            refused=tally[Measure.REFUSED],
            not_sent=tally[Measure.NOT_SENT],
        ),
        "charged": ChargedView(charged_tasks(tally), yuan(charged_money(tally))),
        "spent": SpendingView(
            observed=AmountView(tally[Measure.OBSERVED_COUNT], yuan(tally[Measure.OBSERVED_MONEY])),
            estimated=AmountView(tally[Measure.ESTIMATED_COUNT], yuan(tally[Measure.ESTIMATED_MONEY])),
            unknown=UnclearView(tally[Measure.UNKNOWN_COST], yuan(tally[Measure.UNKNOWN_MONEY])),
        ),
        "refunded": RefundedView(
            tally[Measure.REFUNDED], tally[Measure.REFUNDED_COUNT], yuan(tally[Measure.REFUNDED_MONEY])
        ),
    }
