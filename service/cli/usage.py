"""`gateway usage`, `gateway submission` and `gateway refund`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from service.api.schemas import Submission, Usage, UsageRow, UsageSum
from service.cli.client import AdminClient, with_admin_client
from service.cli.formatting import format_record, format_table

_COLUMNS = (
    *("running", "succeeded", "failed", "unknown", "refused", "not sent"),
    *("refunded", "charged", "charged yuan", "uses", "yuan"),
)


@with_admin_client
def show_usage(port: AdminClient, *, as_json: bool, as_csv: bool, **asked: str | None) -> None:
    """Show what tenants have spent; `asked` is the query."""
    query: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if as_csv:
        click.echo(port.request("GET", "usage", accept="text/csv", **query).text(), nl=False)
        return
    answer = port.request("GET", "usage", **query)
    click.echo(answer.format_json() if as_json else _format_usage(answer.decode(Usage)))


@with_admin_client
def show_submission(port: AdminClient, *, submission: str, as_json: bool) -> None:
    """Show what became of a submission."""
    answer = port.request("GET", "submissions", submission)
    click.echo(answer.format_json() if as_json else _format_submission(answer.decode(Submission)))


@with_admin_client
def refund_submission(port: AdminClient, *, as_json: bool, **body: str | None) -> None:
    """Give the cost of a task or a submission back."""
    answer = port.request("POST", "refunds", body={name: value for name, value in body.items() if value is not None})
    click.echo(answer.format_json() if as_json else _format_submission(answer.decode(Submission)))


def _format_usage(usage: Usage) -> str:
    parts = [f"From {usage.first} to {usage.last}, in UTC.", _format_rows(usage)]
    if usage.unknown_submissions:
        rows = [(each.id, each.tenant, each.kind, each.day) for each in usage.unknown_submissions]
        parts.append(format_table(("unknown submission", "tenant", "kind", "day"), rows))
    if usage.refunds:
        head = ("refunded submission", "tenant", "kind", "day", "uses", "yuan", "refunded at", "reason")
        refunds = [
            (each.submission, each.tenant, each.kind, each.day, each.count, each.money, each.refunded_at, each.reason)
            for each in usage.refunds
        ]
        parts.append(format_table(head, refunds))
    return "\n\n".join(parts)


def _format_rows(usage: Usage) -> str:
    """The items and their sum; tenants of one name, as of one that was deleted, are told apart by their ids."""
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


def _format_submission(submission: Submission) -> str:
    task, cost, given = submission.task, submission.cost, submission.refund
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
        ("cost", cost and f"{_format_amount(cost.count, cost.money)}, {cost.basis}"),
        ("refunded", given and _format_amount(given.count, given.money)),
        ("refunded at", given and given.refunded_at),
        ("reason", given and given.reason),
    )


def _format_amount(uses: int, yuan: float) -> str:
    return f"{uses} uses, {yuan} yuan"
