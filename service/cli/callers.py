"""Commands of callers: their tasks, limits and usage. `submit` and `download` are modules of their own."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import click

from service.cli.common import json_option, print_errors
from service.cli.formatting import DURATION, choice, format_json, format_record, format_table
from service.cli.reports import format_cost, format_policies, format_submission, format_usage
from service.client import (
    TOKEN_VARIABLE,
    URL_VARIABLE,
    GatewayClient,
    GatewayError,
    GatewayUnavailable,
    KindName,
    NoResult,
    NotConfigured,
    ProblemError,
    Quota,
    StateName,
    SubmissionInFlight,
    SubmissionUnknown,
    Task,
    TaskFailed,
    WaitTimeout,
    may_be_served,
    read_token,
)
from service.domain.tasks import Kind, State

_RETRY_SECONDS = 20.0
"""For which reads are repeated."""
_DEFAULT_PORT = "8080"


class ExitCode(IntEnum):
    """Exit codes of the callers' commands. Of several files the highest one counts."""

    SUCCESS = 0
    FAILED = 1
    USAGE = 2
    UNFINISHED = 3
    REFUSED = 4
    UNAVAILABLE = 5
    UNKNOWN = 6
    INTERRUPTED = 130


EXIT_CODES_HELP = """\b
Exit codes, of several files the highest:
  0  done
  1  a task failed
  2  wrong usage, no token, or a file that can't be read or written
  3  a task had not ended in time; it continues
  4  refused: the request, the image or a limit; nothing was charged
  5  no gateway, or it can't serve this now; nothing was charged
  6  no response: it may have been charged. The same command within 24
     hours does not send the image again, and shows the outcome once it is
     known; `gateway submission ID` shows it too
"""
ENVIRONMENT_HELP = """\b
Environment:
  GATEWAY_URL    address of the gateway  [default: http://127.0.0.1:8080]
  GATEWAY_TOKEN  your token, or GATEWAY_TOKEN_FILE with the name of its file
"""


_CODES: Sequence[tuple[type[Exception] | tuple[type[Exception], ...], ExitCode]] = (
    (TaskFailed, ExitCode.FAILED),
    ((NotConfigured, NoResult, OSError, ValueError), ExitCode.USAGE),
    (WaitTimeout, ExitCode.UNFINISHED),
    ((SubmissionUnknown, SubmissionInFlight), ExitCode.UNKNOWN),
    (GatewayUnavailable, ExitCode.UNAVAILABLE),
    (ProblemError, ExitCode.REFUSED),
)


def exit_code_of(error: Exception) -> ExitCode:
    if isinstance(error, GatewayError) and error.idempotency_key and may_be_served(error):
        return ExitCode.UNKNOWN
    return next((code for kinds, code in _CODES if isinstance(error, kinds)), ExitCode.UNAVAILABLE)


@contextmanager
def report_errors() -> Iterator[None]:
    """Report an error of the gateway on one line, and exit with its code."""
    try:
        yield
    except (GatewayError, OSError) as error:
        print_errors([str(error)])
        raise click.exceptions.Exit(exit_code_of(error)) from None


url_option = click.option("--url", help="Address of the gateway.  [default: GATEWAY_URL, else http://127.0.0.1:8080]")


def find_gateway(url: str | None) -> tuple[str, str]:
    """Return the address and the token.

    Without either in the environment, these are the demo tenant's of a gateway in development on this machine. Raises
    NotConfigured.
    """
    url, token = url or os.environ.get(URL_VARIABLE), read_token()
    demo_token = Path(os.environ.get("GATEWAY_DATA_DIR") or ".gateway") / "demo.token"
    if not token and not url and demo_token.is_file():
        token = demo_token.read_text(encoding="utf-8").strip()
    if not token:
        raise NotConfigured(
            f"there is no token: set {TOKEN_VARIABLE} or {TOKEN_VARIABLE}_FILE to yours, and {URL_VARIABLE} to the "
            f"address of the gateway (without both, a gateway in development is used, whose token is in {demo_token})"
        )
    return url or f"http://127.0.0.1:{os.environ.get('GATEWAY_PORT') or _DEFAULT_PORT}", token


def with_client(command: Callable[..., None]) -> Callable[..., None]:
    """Pass a client with the caller's token as the first argument."""

    @url_option
    @functools.wraps(command)
    def run_command(*, url: str | None, **arguments: Any) -> None:
        with report_errors(), GatewayClient(*find_gateway(url), retry_seconds=_RETRY_SECONDS) as gateway:
            command(gateway, **arguments)

    return run_command


def format_task(task: Task) -> str:
    return format_record(
        ("task", task.id),
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


def _format_tasks(tasks: Sequence[Task]) -> str:
    head = ("created at", "finished at", "kind", "state", "cost", "task")
    rows = [
        (item.created_at, item.finished_at, item.kind, item.state, format_cost(item.cost), item.id) for item in tasks
    ]
    return format_table(head, rows)


def _format_quota(quota: Quota) -> str:
    account = quota.account
    pays = format_record(("can be paid now", account.can_pay), ("next check at", account.look_again_at))
    return f"{format_policies(quota.policies, none='You have no limits.')}\n\n{pays}"


@click.command(epilog=ENVIRONMENT_HELP)
@click.option("--state", type=choice(State), help="Only tasks in this state.")
@click.option("--kind", type=choice(Kind), help="Only tasks of this kind.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Maximum number.")
@json_option
@with_client
def tasks(gateway: GatewayClient, *, state: StateName | None, kind: KindName | None, limit: int, as_json: bool) -> None:
    """List your tasks, newest first."""
    items = gateway.list_tasks(state=state, kind=kind, limit=limit)
    click.echo(format_json(items) if as_json else _format_tasks(items))


@click.command(epilog=f"{EXIT_CODES_HELP}\n{ENVIRONMENT_HELP}")
@click.argument("task_id", metavar="ID")
@click.option("--wait", is_flag=True, help="Wait for its end.")
@click.option("--timeout", type=DURATION, default="10m", show_default=True, help="Time to wait: 90, 10m, 1h.")
@json_option
@with_client
def task(gateway: GatewayClient, *, task_id: str, wait: bool, timeout: float, as_json: bool) -> None:
    """Show your task ID."""
    error: TaskFailed | WaitTimeout | None = None
    try:
        found = gateway.wait(task_id, timeout_seconds=timeout) if wait else gateway.get_task(task_id)
    except (TaskFailed, WaitTimeout) as ended:
        found, error = ended.task, ended
    click.echo(format_json(found) if as_json else format_task(found))
    if error:
        raise error


@click.command(epilog=ENVIRONMENT_HELP)
@json_option
@with_client
def quota(gateway: GatewayClient, *, as_json: bool) -> None:
    """Show your limits and their use."""
    found = gateway.get_quota()
    click.echo(format_json(found) if as_json else _format_quota(found))


@click.command(epilog=ENVIRONMENT_HELP)
@click.option("--from", "from_", metavar="DAY", help="The first day, in UTC.  [default: the first of the month]")
@click.option("--to", metavar="DAY", help="The last day, included.  [default: today]")
@click.option("--interval", type=click.Choice(["day", "month", "total"]), help="Period of a row.  [default: day]")
@click.option("--group-by", type=click.Choice(["kind", "none"]), help="Rows of each period.  [default: kind]")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
@with_client
def usage(gateway: GatewayClient, *, as_csv: bool, as_json: bool, **query: str | None) -> None:
    """Show your tasks and spending."""
    if as_csv and as_json:
        raise click.UsageError("Use --csv or --json, not both.")
    named = {name: value for name, value in query.items() if value}
    if as_csv:
        click.echo(gateway.get_usage_csv(**named), nl=False)
        return
    found = gateway.get_usage(**named)
    click.echo(format_json(found) if as_json else format_usage(found, for_operators=False))


@click.command(epilog=ENVIRONMENT_HELP)
@click.argument("submission_id", metavar="ID")
@json_option
@with_client
def submission(gateway: GatewayClient, *, submission_id: str, as_json: bool) -> None:
    """Show the outcome of your submission ID, which an error `submission-unknown` named."""
    found = gateway.get_submission(submission_id)
    click.echo(format_json(found) if as_json else format_submission(found))
