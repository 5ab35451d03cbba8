"""`gateway token`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import click

from service.api.admin_schemas import NewTokenView, TenantView, TokenView
from service.cli.client import OperatorsPort, as_json, asking
from service.cli.shown import table, text
from service.cli.values import Duration, Moment


@click.group()
def token() -> None:
    """Tokens, with which tenants show who they are."""


@token.command("create")
@click.argument("tenant")
@click.option("--label", help="What it is for.")
@click.option("--expires-at", type=Moment(), help="When it ends to be valid, with a time zone: 2030-01-31T12:00:00Z.")
@click.option("--expires-in", type=Duration(), help="How long it is valid: 90d, 12h, 30m.")
@as_json
@asking
def create(
    port: OperatorsPort,
    *,
    tenant: str,
    label: str | None,
    expires_at: datetime | None,
    expires_in: float | None,
    as_json: bool,
) -> None:
    """Make a token for TENANT, and print it: it is shown this once."""
    if expires_at and expires_in is not None:
        raise click.UsageError("Say either --expires-at or --expires-in.")
    now = datetime.now(UTC)
    if expires_in is not None:
        try:
            expires_at = now + timedelta(seconds=expires_in)
        except OverflowError:
            raise click.UsageError("It would outlive every calendar: leave --expires-in out.") from None
    if expires_at and expires_at <= now:
        raise click.UsageError("It would have expired already.")
    answer = port.ask("POST", "tenants", tenant, "tokens", body={"label": label, "expires_at": expires_at})
    if as_json:
        click.echo(answer.pretty())
        return
    made = answer.read(NewTokenView)
    until = f"valid until {text(made.expires_at)}" if made.expires_at else "valid until it is revoked"
    click.echo(f"Token {made.id} of {tenant}, {until}. It is not shown again.", err=True)
    click.echo(made.token)


@token.command("list")
@click.argument("tenant")
@as_json
@asking
def list_tokens(port: OperatorsPort, *, tenant: str, as_json: bool) -> None:
    """List the tokens of TENANT that have not expired."""
    answer = port.ask("GET", "tenants", tenant)
    tokens = answer.read(TenantView).tokens
    click.echo(answer.part(items=tokens).pretty() if as_json else tokens_table(tokens))


@token.command("revoke")
@click.argument("tenant")
@click.argument("token_id", metavar="ID")
@click.option("--grace", type=Duration(), default=0, help="How long it stays valid yet: 3600 (seconds), 1h, 7d.")
@asking
def revoke(port: OperatorsPort, *, tenant: str, token_id: str, grace: float) -> None:
    """Revoke the token ID of TENANT."""
    port.ask("DELETE", "tenants", tenant, "tokens", token_id, grace=grace)
    when = f"ends in {grace:g} seconds" if grace else "is revoked"
    click.echo(f"The token {token_id} of {tenant} {when}.")


def tokens_table(tokens: Sequence[TokenView]) -> str:
    """The tokens of a tenant, by what is known of them."""
    if not tokens:
        return "It has no token."
    rows = [(each.id, each.label, each.created_at, each.expires_at) for each in tokens]
    return table(("token", "label", "created at", "expires at"), rows)
