"""The command `gateway`.

What a command needs is imported when it runs, so that `gateway --help` answers at once.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import BinaryIO

import click

from service import __version__
from service.cli.common import DetailedExitCommand, ExtraMissingError, FieldErrorGroup, LazyGroup, load_settings

_url_option = click.option(
    "--url", help="The operators' port.  [default: as GATEWAY_OPS_HOST and GATEWAY_OPS_PORT say]"
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print it for scripts.")


@click.group(cls=FieldErrorGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gateway")
def main() -> None:
    """The Imaging Gateway: tenants, quota and exact spending in front of a paid image API."""


main.add_command(LazyGroup("account", "service.cli.admin", "Accounts at the upstream."))
main.add_command(LazyGroup("tenant", "service.cli.admin", "Services that may submit tasks."))
main.add_command(LazyGroup("webhook", "service.cli.admin", "What tenants are told when their tasks end."))
main.add_command(LazyGroup("clock", "service.cli.admin", "The ledger's time."))
main.add_command(LazyGroup("token", "service.cli.admin", "Tokens, with which tenants show who they are."))


@main.command()
@click.argument("tenant")
@_url_option
@_json_option
def quota(tenant: str, url: str | None, *, as_json: bool) -> None:
    """Show what TENANT may spend, and what it has spent."""
    from service.cli.admin import show_quota

    show_quota(url=url, name=tenant, as_json=as_json)


@main.command()
@click.option("--from", "first", metavar="DAY", help="The first day, in UTC.  [default: the first of the month]")
@click.option("--to", "last", metavar="DAY", help="The last day, included.  [default: today]")
@click.option("--interval", type=click.Choice(["day", "month", "total"]), help="What a line is.  [default: day]")
@click.option("--group-by", metavar="WORDS", help="tenant, kind, both with a comma, or none.  [default: tenant,kind]")
@click.option("--tenant", help="Only this tenant.")
@click.option("--csv", "as_csv", is_flag=True, help="Print it for spreadsheets.")
@_url_option
@_json_option
def usage(*, first: str | None, last: str | None, as_csv: bool, as_json: bool, **options: str | None) -> None:
    """Show what tenants have spent, those that were deleted too."""
    from service.cli.usage import show_usage

    if as_csv and as_json:
        raise click.UsageError("Say either --csv or --json.")
    show_usage(as_csv=as_csv, as_json=as_json, **{"from": first, "to": last}, **options)


@main.command()
@click.argument("submission", metavar="ID")
@_url_option
@_json_option
def submission(submission: str, url: str | None, *, as_json: bool) -> None:
    """Show what became of the submission ID."""
    from service.cli.usage import show_submission

    show_submission(url=url, submission=submission, as_json=as_json)


@main.command()
@click.option("--task", metavar="ID", help="The task to refund.")
@click.option("--submission", metavar="ID", help="The submission to refund, if it has no task.")
@click.option("--reason", required=True, help="Why: the usage shows it.")
@_url_option
@_json_option
def refund(*, task: str | None, submission: str | None, reason: str, url: str | None, as_json: bool) -> None:
    """Give what a task or a submission cost back to its tenant's limits, once."""
    from service.cli.usage import refund_submission as give_back

    if (task is None) == (submission is None):
        raise click.UsageError("Say either --task or --submission.")
    give_back(url=url, task=task, submission=submission, reason=reason, as_json=as_json)


@main.command()
@_url_option
@_json_option
def export(url: str | None, *, as_json: bool) -> None:
    """Print the registry as TOML: accounts, tenants and tokens.

    All but history can be restored from it with `gateway apply`. It holds no secrets: of tokens their hashes, of other
    secrets where they are.
    """
    from service.cli.registry import export_registry

    export_registry(url=url, as_json=as_json)


@main.command(cls=DetailedExitCommand)
@click.argument("file", type=click.File("rb"))
@click.option("--dry-run", is_flag=True, help="Show what would be different, and change nothing.")
@click.option("--prune", is_flag=True, help="Remove the accounts, tenants and tokens that are not in the file.")
@click.option("--force", is_flag=True, help="Remove even what has tasks running, and even all there is.")
@_url_option
@_json_option
def apply(file: BinaryIO, url: str | None, *, dry_run: bool, prune: bool, force: bool, as_json: bool) -> None:
    """Make the registry what FILE says, all of it or nothing, and show what is different.

    FILE is TOML as `gateway export` prints it, or `-`. What it names is replaced: what is left out there gets its
    default, only ids and secrets are kept. What it does not name stays, unless --prune is given. Secrets are not in
    it, but where this command finds them: `user_key = { env = "MAIN_USER_KEY" }`, or `{ file = "main.key" }`, beside
    FILE.

    The exit code is 0 if all is as FILE says now, 1 if something is wrong, and with --dry-run 2 if something would be
    different.
    """
    from service.cli.registry import apply_file

    apply_file(url=url, file=file, dry_run=dry_run, prune=prune, force=force, as_json=as_json)


@main.command()
@_url_option
@_json_option
def reseal(url: str | None, *, as_json: bool) -> None:
    """Seal all secrets of the registry with the first of GATEWAY_SECRET_KEYS.

    Before the others are taken away, and after every process was given the first. The exit code is 1 if there is a
    secret that none of the keys opens.
    """
    from service.cli.registry import rotate_keys as seal_anew

    seal_anew(url=url, as_json=as_json)


@main.command()
def serve() -> None:
    """Run the gateway until it is told to end."""
    from service.cli.serve import run

    settings = load_settings()
    sys.exit(run(settings))


@main.command("check-config")
@click.option("--production", is_flag=True, help="Judge the settings as with GATEWAY_ENV=production.")
@click.option("--connect", is_flag=True, help="Try the store and the upstream, at no cost: nothing is sent upstream.")
def check_config(*, production: bool, connect: bool) -> None:
    """Say what the settings amount to, or all that is wrong with them, and start nothing.

    Secrets are not shown. The exit code is 0 if the settings can be used, else 1.
    """
    from service.cli.check_config import check_settings

    sys.exit(check_settings(os.environ, production=production, connect=connect))


@main.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Where tasks outlive a restart.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8082, show_default=True, help="0 takes a free one.")
def sandbox(folder: Path | None, host: str, port: int) -> None:
    """Run the stand-in for the upstream: the vendor's API with real image processing."""
    from service.cli.sandbox import run_sandbox

    sys.exit(run_sandbox(folder, host, port))


@main.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("demo-results"), show_default=True)
@click.option("--url", help="The gateway's address.  [default: as GATEWAY_HOST and GATEWAY_PORT say]")
@click.option("--token", help="A tenant's token.  [default: the demo tenant's]")
def demo(folder: Path, url: str | None, token: str | None) -> None:
    """Submit a picture of each kind to a running gateway, and show what comes of it."""
    from service.cli.serve import read_demo_token

    try:
        from service.demo.run import DemoOptions, run_demo
    except ModuleNotFoundError as error:
        if error.name != "PIL":
            raise
        raise ExtraMissingError("the demo", error) from error
    settings = load_settings()
    token = token or read_demo_token(settings.data_dir)
    if token is None:
        click.echo(
            f"gateway: no demo token is in {settings.data_dir}: start a gateway with `make run`, or give --token",
            err=True,
        )
        sys.exit(1)
    options = DemoOptions(
        base_url=url or f"http://{settings.host}:{settings.port}",
        token=token,
        folder=folder,
        output=sys.stdout,
        interactive=sys.stdout.isatty(),
    )
    sys.exit(asyncio.run(run_demo(options)))


@main.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("openapi"), show_default=True)
@click.option("--check", is_flag=True, help="Write nothing; fail if a file is not what the code says.")
def openapi(folder: Path, *, check: bool) -> None:
    """Write the OpenAPI documents of both ports."""
    from service.cli.openapi import write_openapi

    sys.exit(write_openapi(folder, check=check))
