"""Text forms of usage, limits and submissions, for operators and callers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from service.api.schemas import Cost, Policy, Submission, Usage, UsageRow, UsageSum
from service.cli.formatting import format_number, format_record, format_table, format_value

_COLUMNS = (
    *("running", "succeeded", "failed", "unknown", "refused", "not sent"),
    *("refunded", "charged", "charged yuan", "uses", "yuan"),
)


def format_usage(usage: Usage) -> str:
    parts = [f"From {usage.first} to {usage.last}, in UTC.", _format_rows(usage)]
    if usage.unknown_submissions:
        rows = [(item.id, item.tenant, item.kind, item.day) for item in usage.unknown_submissions]
        parts.append(format_table(("unknown submission", "tenant", "kind", "day"), rows))
    if usage.refunds:
        head = ("refunded submission", "tenant", "kind", "day", "uses", "yuan", "refunded at", "reason")
        refunds = [
            (item.submission, item.tenant, item.kind, item.day, item.count, item.money, item.refunded_at, item.reason)
            for item in usage.refunds
        ]
        parts.append(format_table(head, refunds))
    return "\n\n".join(parts)


def _format_rows(usage: Usage) -> str:
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
    return format_table(("period", "tenant", "kind", *_COLUMNS), [*rows, total])


def _row_values(row: UsageRow | UsageSum) -> Sequence[int | float]:
    tasks, spent = row.tasks, row.spent
    return (
        *(tasks.running, tasks.succeeded, tasks.failed, tasks.unknown, tasks.refused, tasks.not_sent),
        *(row.refunded.tasks, row.charged.tasks, row.charged.money),
        spent.observed.count + spent.estimated.count,
        round(spent.observed.money + spent.estimated.money, 2),
    )


def format_policies(policies: Sequence[Policy]) -> str:
    if not policies:
        return "It has no limits."
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
    return format_record(
        ("submission", submission.id),
        ("tenant", submission.tenant),
        ("account", submission.account),
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
