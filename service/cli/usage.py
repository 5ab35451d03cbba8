"""Commands for usage, quota, tasks, submissions, refunds and webhooks."""

from __future__ import annotations

from datetime import date
from typing import Any, BinaryIO

import click

from service.api.admin_schemas import Delivery, DeliveryList, NewSecret, Tenant
from service.api.schemas import OperatorTask, OperatorTaskList, Submission, Usage, render_csv, tabulate_items
from service.cli.client import AdminClient, AdminResponse, print_response, with_admin_client
from service.cli.common import LazyCommand, json_option, named_fields
from service.cli.formatting import DURATION, MONTH, choice, format_record, format_table, format_value
from service.cli.reports import format_cost, format_policies, format_report, format_submission, format_usage
from service.domain.tasks import Kind, State

_MAX_PAGE_SIZE = 100


def _format_task(task: OperatorTask) -> str:
    return format_record(
        ("task", task.id),
        ("submission", task.submission),
        ("tenant", task.tenant),
        ("account", task.account),
        ("kind", task.kind),
        ("state", task.state),
        ("error", task.error and task.error.detail),
        ("cost", format_cost(task.cost)),
        ("created at", task.created_at),
        ("updated at", task.updated_at),
        ("finished at", task.finished_at),
        ("options", [f"{name}={value}" for name, value in task.options.items()]),
        ("metadata", [f"{name}={value}" for name, value in task.metadata.items()]),
        ("results", [artifact.name for artifact in task.artifacts]),
    )


def _format_tasks(tasks: OperatorTaskList) -> str:
    head = ("created at", "finished at", "kind", "state", "account", "cost", "submission")
    rows = [
        (
            item.created_at,
            item.finished_at,
            item.kind,
            item.state,
            item.account,
            format_cost(item.cost),
            item.submission,
        )
        for item in tasks.items
    ]
    return format_table(head, rows)


@click.command()
@click.option("--from", metavar="DAY", help="The first day, in UTC.  [default: the first of the month]")
@click.option("--to", metavar="DAY", help="The last day, included.  [default: today]")
@click.option("--interval", type=click.Choice(["day", "month", "total"]), help="Period of a row.  [default: day]")
@click.option("--group-by", metavar="WORDS", help="tenant, kind, both with a comma, or none.  [default: tenant,kind]")
@click.option("--tenant", help="Only this tenant.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
@with_admin_client
def usage(client: AdminClient, *, as_csv: bool, as_json: bool, **options: str | None) -> None:
    """Show tasks and spending of tenants, including deleted ones."""
    if as_csv and as_json:
        raise click.UsageError("Use --csv or --json, not both.")
    query = named_fields(options)
    if as_csv:
        click.echo(client.request("GET", "usage", accept="text/csv", **query).content, nl=False)
        return
    response = client.request("GET", "usage", **query)
    click.echo(response.format_json() if as_json else format_usage(response.decode(Usage)))


@click.command()
@click.option("--month", type=MONTH, help="The month, in UTC: 2026-11.  [default: the current one]")
@click.option("--tenant", help="Only this tenant.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("-o", "--output", type=click.File("wb", atomic=True), help="Write CSV to this file too.")
@json_option
@with_admin_client
def report(
    client: AdminClient,
    *,
    month: tuple[date, date] | None,
    output: BinaryIO | None,
    as_csv: bool,
    as_json: bool,
    **options: str | None,
) -> None:
    """Show what each tenant spent in a month, by kind and by basis, also deleted tenants.

    A row has the submissions of the month, whenever they ended. Charged is what limits count: the uses and the yuan
    observed and estimated, and the yuan held for submissions of unknown outcome, less what was refunded.
    """
    if as_csv and as_json:
        raise click.UsageError("Use --csv or --json, not both.")
    query = named_fields(options) | ({"from": str(month[0]), "to": str(month[1])} if month else {})
    response = client.request("GET", "usage", interval="month", group_by="tenant,kind", **query)
    spending = response.decode(Usage)
    items = response.decode(dict[str, Any])["items"]  # as sent: decoded amounts are floats
    table = render_csv(*tabulate_items(items, for_operators=True))
    if output:
        output.write(table)
    if as_csv:
        click.echo(table, nl=False)
    else:
        click.echo(response.format_json() if as_json else format_report(spending))


@click.command()
@click.argument("tenant")
@json_option
@with_admin_client
def quota(client: AdminClient, *, tenant: str, as_json: bool) -> None:
    """Show the limits of TENANT and their use."""
    response = client.request("GET", "tenants", tenant)
    policies = response.decode(Tenant).policies
    if as_json:
        policies = response.decode(dict[str, Any])["policies"]  # as sent: decoded amounts are floats
        click.echo(response.with_members(policies=policies).format_json())
    else:
        click.echo(format_policies(policies))


@click.command()
@click.argument("submission", metavar="ID")
@print_response(Submission, format_submission)
def submission(client: AdminClient, *, submission: str) -> AdminResponse:
    """Show the outcome of the submission ID, which may be the id of its task."""
    return client.request("GET", "submissions", submission)


@click.command()
@click.argument("target", metavar="ID", required=False)
@click.option("--task", hidden=True)  # until 0.3.0, like --submission
@click.option("--submission", hidden=True)
@click.option("--reason", required=True, help="The reason, which the usage shows.")
@print_response(Submission, format_submission)
def refund(client: AdminClient, *, reason: str, **targets: str | None) -> AdminResponse:
    """Return the cost of ID, a task or a submission, to its tenant's limits, once."""
    ids = [target for target in targets.values() if target is not None]
    if len(ids) != 1:
        raise click.UsageError("The ID of one task or submission is required.")
    return client.request("POST", "refunds", body={"submission": ids[0], "reason": reason})


@click.group()
def task() -> None:
    """Show tasks of tenants."""


@task.command("show")
@click.argument("task_id", metavar="ID")
@print_response(OperatorTask, _format_task)
def show_task(client: AdminClient, *, task_id: str) -> AdminResponse:
    """Show the task ID, which may be the id of its submission."""
    return client.request("GET", "tasks", task_id)


@task.command("list")
@click.option("--tenant", required=True, help="The tenant, or a deleted one.")
@click.option("--state", type=choice(State), help="Only tasks in this state.")
@click.option("--kind", type=choice(Kind), help="Only tasks of this kind.")
@click.option("--limit", type=click.IntRange(1, 1_000), default=20, show_default=True, help="Maximum number.")
@print_response(OperatorTaskList, _format_tasks)
def list_tasks(client: AdminClient, *, limit: int, **options: str | None) -> AdminResponse:
    """List the tasks of a tenant, newest first."""
    query = named_fields(options)
    items: list[Any] = []
    while True:
        response = client.request("GET", "tasks", limit=min(limit - len(items), _MAX_PAGE_SIZE), **query)
        page = response.decode(OperatorTaskList)
        items += response.decode(dict[str, Any])["items"]  # as sent: decoded amounts are floats
        if page.next_cursor is None or len(items) == limit:
            break
        query["cursor"] = page.next_cursor
    return response.with_members(items=items, next_cursor=page.next_cursor)


def _format_deliveries(deliveries: DeliveryList) -> str:
    head = ("id", "tenant", "state", "attempts", "status", "error", "url", "updated at", "about")
    rows = [
        (
            *(item.id, item.tenant, item.state, item.attempts, item.status, item.error, item.url, item.updated_at),
            item.threshold or item.task,
        )
        for item in deliveries.items
    ]
    return format_table(head, rows)


@click.group()
def webhook() -> None:
    """Manage webhooks, which report finished tasks and used limits to tenants."""


@webhook.command("rotate-secret")
@click.argument("tenant")
@click.option(
    "--grace", type=DURATION, default="0", show_default=True, help="Time for which the previous secret signs too: 7d."
)
@json_option
@with_admin_client
def rotate_webhook_secret(client: AdminClient, *, tenant: str, grace: float, as_json: bool) -> None:
    """Generate a new webhook secret for TENANT and print it, once."""
    response = client.request("POST", "tenants", tenant, "webhook-secret", grace=grace)
    if as_json:
        click.echo(response.format_json())
        return
    rotated = response.decode(NewSecret)
    note = f" The previous one signs too until {format_value(rotated.previous_expires_at)}." if grace else ""
    click.echo(f"The new secret of {tenant}. It is not shown again.{note}", err=True)
    click.echo(rotated.secret)


# The name until 0.2.0.
webhook.add_command(LazyCommand("rotate", "service.cli.usage", attribute="rotate_webhook_secret"))


@webhook.command("failed")
@click.option("--limit", type=click.IntRange(1, 1_000), default=100, show_default=True, help="Maximum number.")
@print_response(DeliveryList, _format_deliveries)
def list_failed_deliveries(client: AdminClient, *, limit: int) -> AdminResponse:
    """List the failed deliveries of the last 30 days, newest first."""
    return client.request("GET", "webhooks", "failed", limit=limit)


@webhook.command("redeliver")
@click.argument("delivery", metavar="ID")
@print_response(Delivery, lambda item: _format_deliveries(DeliveryList([item])))
def redeliver_webhook(client: AdminClient, *, delivery: str) -> AdminResponse:
    """Repeat the delivery ID msg_..., with all its attempts."""
    return client.request("POST", "webhooks", delivery, "redeliver")
