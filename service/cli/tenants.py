"""`gateway tenant` and `gateway quota`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import click

from service.api.admin_schemas import LimitView, TenantList, TenantView
from service.api.schemas import PolicyView
from service.cli.client import Answer, OperatorsPort, as_json, asking
from service.cli.shown import card, table
from service.cli.tokens import tokens_table
from service.cli.values import Limit
from service.cli.webhooks import webhook_body, webhook_lines, webhook_options
from service.domain.tasks import Kind
from service.domain.tenants import Purse


@click.group()
def tenant() -> None:
    """Services that may submit tasks."""


@tenant.command("set")
@click.argument("name")
@click.option(
    "--account", "accounts", multiple=True, required=True, help="An account it may use; in order, repeatable."
)
@click.option("--limit", "limits", type=Limit(), multiple=True, help="What it may spend in a window; repeatable.")
@click.option("--max-active", type=click.IntRange(min=0), help="How many tasks may run at once.")
@click.option(
    "--purse",
    type=click.Choice([each.value for each in Purse]),
    help="Whether it may go on to money after the prepaid uses.",
)
@click.option(
    "--kind",
    "kinds",
    type=click.Choice([each.value for each in Kind]),
    multiple=True,
    help="A kind it may submit; repeatable.",
)
@click.option("--disabled", is_flag=True, help="Refuse all that it submits.")
@webhook_options
@as_json
@asking
def set_tenant(
    port: OperatorsPort,
    *,
    name: str,
    accounts: Sequence[str],
    limits: Sequence[Mapping[str, Any]],
    kinds: Sequence[str],
    webhook_url: str | None,
    webhook_allow: Sequence[str],
    webhook_secret_file: BinaryIO | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Make or replace the tenant NAME.

    What is left out gets its default; its tokens stay, and the secret of its webhooks. One that is made is printed.
    """
    webhook = webhook_body(webhook_url, webhook_allow, webhook_secret_file)
    body = {field: value for field, value in given.items() if value is not None}
    body |= {"accounts": accounts, "limits": limits, "kinds": kinds or None, "webhook": webhook}
    answer = port.ask("PUT", "tenants", name, body=body)
    _print_tenant(answer, as_json=as_json)
    made = answer.read(TenantView).webhook
    if made and made.secret and not as_json:
        click.echo(f"\nThe secret of its webhooks, which is not shown again: {made.secret}")


@tenant.command("list")
@as_json
@asking
def list_tenants(port: OperatorsPort, *, as_json: bool) -> None:
    """List the tenants."""
    answer = port.ask("GET", "tenants")
    if as_json:
        click.echo(answer.pretty())
        return
    head = ("name", "accounts", "limits", "max active", "purse", "kinds", "tokens", "disabled")
    rows = [
        (
            each.name,
            each.accounts,
            _limits(each),
            each.max_active,
            each.purse,
            _kinds(each),
            len(each.tokens),
            each.disabled,
        )
        for each in answer.read(TenantList).items
    ]
    click.echo(table(head, rows))


@tenant.command("show")
@click.argument("name")
@as_json
@asking
def show_tenant(port: OperatorsPort, *, name: str, as_json: bool) -> None:
    """Show the tenant NAME, what it has used, and its tokens."""
    _print_tenant(port.ask("GET", "tenants", name), as_json=as_json)


@tenant.command("delete")
@click.argument("name")
@click.option("--force", is_flag=True, help="Even though its tasks run.")
@asking
def delete_tenant(port: OperatorsPort, *, name: str, force: bool) -> None:
    """Delete the tenant NAME and its tokens."""
    port.ask("DELETE", "tenants", name, force=force)
    click.echo(f"The tenant {name} is deleted.")


@asking
def show_quota(port: OperatorsPort, *, name: str, as_json: bool) -> None:
    """Show how the policies of a tenant stand."""
    answer = port.ask("GET", "tenants", name)
    policies = answer.read(TenantView).policies
    click.echo(answer.part(policies=policies).pretty() if as_json else _policies(policies))


def _print_tenant(answer: Answer, *, as_json: bool) -> None:
    click.echo(answer.pretty() if as_json else _whole(answer.read(TenantView)))


def _whole(tenant: TenantView) -> str:
    about = card(
        ("name", tenant.name),
        ("accounts", tenant.accounts),
        ("purse", tenant.purse),
        ("kinds", _kinds(tenant)),
        ("disabled", tenant.disabled),
        *webhook_lines(tenant.webhook),
    )
    return "\n\n".join([about, _policies(tenant.policies), tokens_table(tenant.tokens)])


def _policies(policies: Sequence[PolicyView]) -> str:
    if not policies:
        return "Nothing limits it."
    head = ("policy", "unit", "limit", "used", "reserved", "remaining", "overrun", "resets at")
    return table(
        head,
        [
            (
                each.policy,
                _unit(each),
                each.limit,
                each.used,
                each.reserved,
                each.remaining,
                each.overrun,
                each.resets_at,
            )
            for each in policies
        ],
    )


def _unit(policy: PolicyView) -> str:
    return "yuan" if policy.unit == "money" else policy.unit


def _limits(tenant: TenantView) -> Sequence[str]:
    return [_limit(each) for each in tenant.limits]


def _limit(limit: LimitView) -> str:
    parts = {"tasks": limit.tasks, "yuan": limit.money}
    return f"{limit.window} " + " + ".join(f"{most} {unit}" for unit, most in parts.items() if most is not None)


def _kinds(tenant: TenantView) -> object:
    return "all" if tenant.kinds is None else tenant.kinds or "none"
