"""The command `gateway`.

Commands import their dependencies when they run, so that `gateway --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import BinaryIO

import click

from service import __version__
from service.cli.common import (
    DetailedExitCommand,
    FieldErrorGroup,
    LazyGroup,
    add_alias,
    json_option,
    load_settings,
    url_option,
)


@click.group(cls=FieldErrorGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gateway")
def main() -> None:
    """The Imaging Gateway: tenants, quota and exact spending in front of a paid image API."""


for _name, _description in {
    "account": "Manage accounts at the upstream.",
    "tenant": "Manage tenants, which submit tasks.",
    "webhook": "Manage webhooks, which report finished tasks to tenants.",
    "clock": "Manage the clock of the ledger.",
    "token": "Manage the bearer tokens of tenants.",
}.items():
    main.add_command(LazyGroup(_name, "service.cli.admin", _description))


@main.command()
@click.argument("tenant")
@url_option
@json_option
def quota(tenant: str, url: str | None, *, as_json: bool) -> None:
    """Show the limits of TENANT and their use."""
    from service.cli.admin import show_quota

    show_quota(url=url, name=tenant, as_json=as_json)


@main.command()
@click.option("--from", "first", metavar="DAY", help="The first day, in UTC.  [default: the first of the month]")
@click.option("--to", "last", metavar="DAY", help="The last day, included.  [default: today]")
@click.option("--interval", type=click.Choice(["day", "month", "total"]), help="Period of a row.  [default: day]")
@click.option("--group-by", metavar="WORDS", help="tenant, kind, both with a comma, or none.  [default: tenant,kind]")
@click.option("--tenant", help="Only this tenant.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@url_option
@json_option
def usage(*, first: str | None, last: str | None, as_csv: bool, as_json: bool, **options: str | None) -> None:
    """Show tasks and spending of tenants, including deleted ones."""
    from service.cli.usage import show_usage

    if as_csv and as_json:
        raise click.UsageError("Use --csv or --json, not both.")
    show_usage(as_csv=as_csv, as_json=as_json, **{"from": first, "to": last}, **options)


@main.command()
@click.argument("submission", metavar="ID")
@url_option
@json_option
def submission(submission: str, url: str | None, *, as_json: bool) -> None:
    """Show the outcome of the submission ID."""
    from service.cli.usage import show_submission

    show_submission(url=url, submission=submission, as_json=as_json)


@main.command()
@click.option("--task", metavar="ID", help="The task to refund.")
@click.option("--submission", metavar="ID", help="The submission to refund, if it has no task.")
@click.option("--reason", required=True, help="The reason, which the usage shows.")
@url_option
@json_option
def refund(*, task: str | None, submission: str | None, reason: str, url: str | None, as_json: bool) -> None:
    """Return the cost of a task or a submission to its tenant's limits, once."""
    from service.cli.usage import refund_submission

    if (task is None) == (submission is None):
        raise click.UsageError("Use --task or --submission, exactly one.")
    refund_submission(url=url, task=task, submission=submission, reason=reason, as_json=as_json)


@main.command()
@url_option
@json_option
def export(url: str | None, *, as_json: bool) -> None:
    """Print the registry as TOML: accounts, tenants and tokens.

    `gateway apply` restores all but history from it. It contains no secrets, only hashes of tokens and references to
    the other secrets.
    """
    from service.cli.registry import export_registry

    export_registry(url=url, as_json=as_json)


@main.command(cls=DetailedExitCommand)
@click.argument("file", type=click.File("rb"))
@click.option("--dry-run", is_flag=True, help="Show the differences, and change nothing.")
@click.option("--prune", is_flag=True, help="Delete the accounts, tenants and tokens that are not in the file.")
@click.option("--force", is_flag=True, help="Delete even entries with running tasks, and even all entries.")
@url_option
@json_option
def apply(file: BinaryIO, url: str | None, *, dry_run: bool, prune: bool, force: bool, as_json: bool) -> None:
    """Change the registry to match FILE, completely or not at all, and show the differences.

    FILE is TOML as `gateway export` prints it, or `-`. Entries in it are replaced: omitted fields get their defaults,
    only ids and secrets are kept. Other entries stay, unless --prune is given. FILE contains references to secrets
    which this command reads: `user_key = { env = "MAIN_USER_KEY" }`, or `{ file = "main.key" }`, relative to FILE.

    The exit code is 0 if the registry matches FILE, 1 after an error, and with --dry-run 2 if there are differences.
    """
    from service.cli.registry import apply_file

    apply_file(url=url, file=file, dry_run=dry_run, prune=prune, force=force, as_json=as_json)


@main.command("rotate-keys")
@url_option
@json_option
def rotate_keys(url: str | None, *, as_json: bool) -> None:
    """Encrypt all secrets of the registry with the first of GATEWAY_SECRET_KEYS.

    Run it when every process has the new first key, and before the other keys are removed. The exit code is 1 if a
    secret can't be decrypted with any of the keys.
    """
    from service.cli.registry import reencrypt_secrets

    reencrypt_secrets(url=url, as_json=as_json)


add_alias(main, "reseal", rotate_keys)  # until 0.2.0


@main.command()
def serve() -> None:
    """Run the gateway until SIGINT or SIGTERM."""
    from service.cli.serve import run

    sys.exit(run(load_settings()))


@main.command("check-config")
@click.option("--production", is_flag=True, help="Check the settings as with GATEWAY_ENV=production.")
@click.option("--connect", is_flag=True, help="Connect to the store and the upstream, at no cost.")
def check_config(*, production: bool, connect: bool) -> None:
    """Print the effective settings, or all their errors, and start nothing.

    Secrets are not shown. The exit code is 0 if the settings are valid, else 1.
    """
    from service.cli.check_config import check_settings

    sys.exit(check_settings(os.environ, production=production, connect=connect))


@main.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Folder for persistent tasks.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8082, show_default=True, help="0 takes a free one.")
def sandbox(folder: Path | None, host: str, port: int) -> None:
    """Run a stand-in for the upstream: the vendor's API with real image processing."""
    from service.cli.dev import run_sandbox

    sys.exit(run_sandbox(folder, host, port))


@main.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("demo-results"), show_default=True)
@click.option("--url", help="Address of the tenants' port.  [default: from GATEWAY_HOST and GATEWAY_PORT]")
@click.option("--token", help="A tenant's token.  [default: the demo tenant's]")
def demo(folder: Path, url: str | None, token: str | None) -> None:
    """Submit an image of each kind to a running gateway, and check the results."""
    from service.cli.dev import run_demo

    sys.exit(run_demo(folder, url, token))


@main.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("openapi"), show_default=True)
@click.option("--check", is_flag=True, help="Write nothing; fail if a file differs from the code.")
def openapi(folder: Path, *, check: bool) -> None:
    """Write the OpenAPI documents of both ports."""
    from service.cli.dev import write_openapi

    sys.exit(write_openapi(folder, check=check))
