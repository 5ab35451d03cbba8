"""Text forms of usage, limits and submissions, for operators and callers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from msgspec import UNSET

from service.cli.formatting import format_number, format_record, format_table, format_value

if TYPE_CHECKING:  # the schemas take 0.2 s to import, which a caller's command does not need
    from service.api import schemas
    from service.client import models

    Cost = schemas.Cost | models.Cost
    Policy = schemas.Policy | models.Policy
    Submission = schemas.Submission | models.Submission
    Usage = schemas.Usage | models.Usage
    UsageRow = schemas.UsageRow | models.UsageRow
    UsageSum = schemas.UsageSum | models.UsageSum

_COLUMNS = (
    *("running", "succeeded", "failed", "unknown", "refused", "not sent"),
    *("refunded", "charged", "charged yuan", "uses", "yuan"),
)
_REPORT_COLUMNS = (
    *("tasks", "uses observed", "yuan observed", "uses estimated", "yuan estimated"),
    *("unknown outcomes", "yuan unknown", "unknown costs"),
    *("refunds", "uses refunded", "yuan refunded", "uses charged", "yuan charged", "yuan overrun"),
)


def format_usage(usage: Usage, *, for_operators: bool = True) -> str:
    table = _format_rows(usage, for_operators)
    return "\n\n".join([_format_period(usage), table, *_format_flagged(usage, for_operators)])


def format_report(usage: Usage) -> str:
    """Format the spending of tenants by kind, with a sum for each tenant that has several."""
    names = _name_tenants(usage)
    rows: list[Sequence[object]] = []
    items: Sequence[UsageRow] = usage.items
    for tenant, group in groupby(items, key=lambda item: (item.tenant, item.tenant_id)):
        amounts = []
        for item in group:
            amounts.append(_list_amounts(item))
            rows.append((names[tenant], item.kind, *amounts[-1]))
        if len(amounts) > 1:
            rows.append((names[tenant], "all", *map(_add_amounts, *amounts)))
    rows.append(("total", None, *_list_amounts(usage.total)))
    table = format_table(("tenant", "kind", *_REPORT_COLUMNS), rows)
    return "\n\n".join([_format_period(usage), table, *_format_flagged(usage, for_operators=True)])


def _list_amounts(row: UsageRow | UsageSum) -> Sequence[int | float]:
    spent, refunded = row.spent, row.refunded
    return (
        *(row.charged.tasks, spent.observed.count, spent.observed.money),
        *(spent.estimated.count, spent.estimated.money, row.tasks.unknown, spent.unknown.money, spent.unknown.tasks),
        *(refunded.tasks, refunded.count, refunded.money),
        *(row.charged.count, row.charged.money, row.overrun),
    )


def _add_amounts(*amounts: float) -> float:
    # To two decimals, since sums of floats are not those of amounts in yuan.
    return round(sum(amounts), 2)


def _format_period(usage: Usage) -> str:
    return f"From {usage.first} to {usage.last}, in UTC."


def _format_flagged(usage: Usage, for_operators: bool) -> Sequence[str]:
    """Format the submissions that a report names."""
    parts = []
    if usage.unknown_submissions:
        rows = [(item.id, item.tenant, item.kind, item.day) for item in usage.unknown_submissions]
        parts.append(_format_owned(("unknown submission", "tenant", "kind", "day"), rows, for_operators))
    if usage.refunds:
        head = ("refunded submission", "tenant", "kind", "day", "uses", "yuan", "refunded at", "reason")
        refunds = [
            (item.submission, item.tenant, item.kind, item.day, item.count, item.money, item.refunded_at, item.reason)
            for item in usage.refunds
        ]
        parts.append(_format_owned(head, refunds, for_operators))
    return parts


def _name_tenants(usage: Usage) -> Mapping[tuple[object, object], object]:
    """Return the tenants' names by name and id; those with the same name, such as a deleted one, with their ids."""
    tenants = {(row.tenant, row.tenant_id) for row in usage.items}
    counts = Counter(name for name, _ in tenants)
    return {(name, number): f"{name} ({number})" if counts[name] > 1 and name else name for name, number in tenants}


def _format_rows(usage: Usage, for_operators: bool) -> str:
    """Format the items and their total."""
    names = _name_tenants(usage)
    rows = [(row.period, names[row.tenant, row.tenant_id], row.kind, *_row_values(row)) for row in usage.items]
    total = ("total", None, None, *_row_values(usage.total))
    return _format_owned(("period", "tenant", "kind", *_COLUMNS), [*rows, total], for_operators)


def _format_owned(head: Sequence[str], rows: Iterable[Sequence[object]], for_operators: bool) -> str:
    """Format a table, for callers without its column `tenant`."""
    shown = [index for index, name in enumerate(head) if for_operators or name != "tenant"]
    return format_table([head[index] for index in shown], [[row[index] for index in shown] for row in rows])


def _row_values(row: UsageRow | UsageSum) -> Sequence[int | float]:
    tasks, spent = row.tasks, row.spent
    return (
        *(tasks.running, tasks.succeeded, tasks.failed, tasks.unknown, tasks.refused, tasks.not_sent),
        *(row.refunded.tasks, row.charged.tasks, row.charged.money),
        spent.observed.count + spent.estimated.count,
        round(spent.observed.money + spent.estimated.money, 2),
    )


def format_policies(policies: Sequence[Policy], *, none: str = "It has no limits.") -> str:
    if not policies:
        return none
    head = ("policy", "unit", "limit", "used", "reserved", "remaining", "overrun", "resets at")
    rows = [
        (
            item.policy,
            "yuan" if item.unit == "money" else item.unit,
            item.limit,
            item.used,
            item.reserved,
            item.remaining,
            item.overrun,
            item.resets_at,
        )
        for item in policies
    ]
    return format_table(head, rows)


def format_submission(submission: Submission) -> str:
    task, cost, refund = submission.task, submission.cost, submission.refund
    owner = [("tenant", submission.tenant), ("account", submission.account)]
    return format_record(
        ("submission", submission.id),
        *(pair for pair in owner if pair[1] is not UNSET),
        ("kind", submission.kind),
        ("outcome", submission.outcome),
        ("balance suggests", submission.balance_suggests),
        ("created at", submission.created_at),
        ("settled at", submission.settled_at),
        ("task", task and task.id),
        ("state of the task", task and task.state),
        ("cost", cost and format_cost(cost)),
        ("refunded", refund and _format_amount(refund.count, refund.money)),
        ("refunded at", refund and refund.refunded_at),
        ("reason", refund and refund.reason),
    )


def format_cost(cost: Cost) -> str:
    return f"{_format_amount(cost.count, cost.money)}, {cost.basis}"


def _format_amount(uses: int, yuan: float) -> str:
    return f"{format_number(uses, 'use')}, {format_value(yuan)} yuan"
