"""Text forms of usage, limits and submissions, for operators and callers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
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


def format_usage(usage: Usage, *, for_operators: bool = True) -> str:
    parts = [f"From {usage.first} to {usage.last}, in UTC.", _format_rows(usage, for_operators)]
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
    return "\n\n".join(parts)


def _format_rows(usage: Usage, for_operators: bool) -> str:
    """Format the items and their total; tenants with the same name, such as a deleted one, get their ids."""
    tenants = {(row.tenant, row.tenant_id) for row in usage.items}
    names = Counter(name for name, _ in tenants)
    rows = [
        (
            row.period,
            f"{row.tenant} ({row.tenant_id})" if names[row.tenant] > 1 else row.tenant,
            row.kind,
            *_row_values(row),
        )
        for row in usage.items
    ]
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
