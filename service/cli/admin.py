"""Commands for accounts, tenants, tokens, webhooks and the clock."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import reduce
from typing import Any, BinaryIO

import click

from service.api import admin_schemas
from service.api.admin_schemas import (
    Account,
    AccountList,
    ClockReset,
    Delivery,
    DeliveryList,
    Figure,
    NewSecret,
    NewToken,
    Tenant,
    TenantList,
    Token,
    Webhook,
)
from service.api.schemas import Policy
from service.cli.client import NOT_FOUND, AdminClient, ProblemError, print_response, with_admin_client
from service.cli.common import LazyCommand, get_environment, json_option
from service.cli.formatting import (
    Duration,
    Limit,
    Price,
    Timestamp,
    Yuan,
    format_record,
    format_table,
    format_value,
    read_secret,
)
from service.domain.tasks import Kind
from service.domain.tenants import SpendingMode, TenantStatus

_SPENDING_MODE = click.Choice([mode.value for mode in SpendingMode])
_KIND = click.Choice([kind.value for kind in Kind])
_WEBHOOK_OPTIONS = (
    click.option("--webhook-url", help="Address that receives the events of its tasks."),
    click.option(
        "--webhook-allow",
        multiple=True,
        help="A further host for its tasks, or a network for hosts such as 127.0.0.0/8; repeatable.",
    ),
    click.option(
        "--webhook-secret-file",
        type=click.File("rb"),
        help="Read the whsec_ secret from a file, or from standard input with `-`.  [default: unchanged, or generated]",
    ),
)


@click.group()
def account() -> None:
    """Manage accounts at the upstream."""


@account.command("set")
@click.argument("name")
@click.option("--user-key-env", metavar="VARIABLE", help="Read the user_key from an environment variable.")
@click.option("--user-key-file", type=click.File("rb"), help="Read it from a file, or from standard input with `-`.")
@click.option("--user-key-prompt", is_flag=True, help="Prompt for it.  [default: for a new account, on a terminal]")
@click.option("--base-url", help="Address of its upstream.  [default: from GATEWAY_UPSTREAM_URL]")
@click.option("--floor-count", type=click.IntRange(min=0), help="Prepaid uses that must remain.")
@click.option("--floor-money", type=Yuan(), help="Money that must remain.")
@click.option("--max-price", type=Price(), multiple=True, help="Maximum price of a kind; repeatable.")
@json_option
@with_admin_client
def set_account(
    client: AdminClient,
    *,
    name: str,
    user_key_env: str | None,
    user_key_file: BinaryIO | None,
    user_key_prompt: bool,
    max_price: Sequence[tuple[str, float]],
    as_json: bool,
    **options: Any,
) -> None:
    """Create or replace the account NAME.

    Omitted options get their defaults; only the key is kept. A key is no argument of the command line, since other
    users could read it there.
    """
    if sum(map(bool, (user_key_env, user_key_file, user_key_prompt))) > 1:
        raise click.UsageError("Use one of --user-key-env, --user-key-file and --user-key-prompt.")
    body = {field: value for field, value in options.items() if value is not None} | {"max_price": dict(max_price)}
    if user_key_env:
        body["user_key"] = get_environment().get(user_key_env)
        if not body["user_key"]:
            raise click.BadParameter(f"there is no environment variable {user_key_env}", param_hint="--user-key-env")
    elif user_key_file:
        body["user_key"] = read_secret(user_key_file, "--user-key-file")
    elif user_key_prompt or (sys.stdin.isatty() and not _account_exists(client, name)):
        body["user_key"] = click.prompt(f"The user_key of {name}", hide_input=True, err=True)
    print_response(client.request("PUT", "accounts", name, body=body), Account, _format_account, as_json=as_json)


@account.command("list")
@json_option
@with_admin_client
def list_accounts(client: AdminClient, *, as_json: bool) -> None:
    """List the accounts with their balances and tasks in flight."""
    print_response(client.request("GET", "accounts"), AccountList, _format_accounts, as_json=as_json)


def _format_accounts(accounts: AccountList) -> str:
    head = ("name", "state", "uses", "yuan", "balance at", "in flight", "unknown", "next check at")
    rows = [
        (item.name, item.state, *_latest_balance(item), item.in_flight, item.unknown, item.look_again_at)
        for item in accounts.items
    ]
    return format_table(head, rows)


@account.command("show")
@click.argument("name")
@json_option
@with_admin_client
def show_account(client: AdminClient, *, name: str, as_json: bool) -> None:
    """Show the account NAME."""
    print_response(client.request("GET", "accounts", name), Account, _format_account, as_json=as_json)


@account.command("reopen")
@click.argument("name")
@json_option
@with_admin_client
def reopen_account(client: AdminClient, *, name: str, as_json: bool) -> None:
    """Use the account NAME again, though it was exhausted or invalid."""
    print_response(client.request("POST", "accounts", name, "reopen"), Account, _format_account, as_json=as_json)


@account.command("delete")
@click.argument("name")
@click.option("--force", is_flag=True, help="Even with running tasks or tenants.")
@with_admin_client
def delete_account(client: AdminClient, *, name: str, force: bool) -> None:
    """Delete the account NAME."""
    client.request("DELETE", "accounts", name, force=force)
    click.echo(f"The account {name} is deleted.")


def _account_exists(client: AdminClient, name: str) -> bool:
    try:
        client.request("GET", "accounts", name)
    except ProblemError as error:
        if error.status != NOT_FOUND:
            raise
        return False
    return True


def _format_account(account: Account) -> str:
    uses, yuan, seen_at = _latest_balance(account)
    return format_record(
        ("name", account.name),
        ("state", account.state),
        ("next check at", account.look_again_at),
        ("uses left", uses),
        ("yuan left", yuan),
        ("balance at", seen_at),
        ("in flight", account.in_flight),
        ("unknown", account.unknown),
        ("unexplained uses", account.unexplained.count),
        ("unexplained yuan", account.unexplained.money),
        ("last price", _format_prices(account.prices)),
        ("live balance checks", account.live_balance_checks),
        ("base URL", account.base_url),
        ("minimum uses", account.floor_count),
        ("minimum yuan", account.floor_money),
        ("maximum price", _format_prices(account.max_price)),
    )


def _format_prices(prices: Mapping[Kind, float]) -> Sequence[str]:
    return [f"{kind} {price} yuan" for kind, price in prices.items()]


def _latest_balance(account: Account) -> tuple[object, object, object]:
    """Return the remaining uses and yuan, and the time of the newer reading."""
    readings: list[Figure | None] = [account.remaining_count, account.remaining_money]
    uses, yuan = (reading.value if reading else None for reading in readings)
    return uses, yuan, max((reading.seen_at for reading in readings if reading and reading.seen_at), default=None)


@click.group()
def token() -> None:
    """Manage the bearer tokens of tenants."""


@token.command("create")
@click.argument("tenant")
@click.option("--label", help="Its purpose.")
@click.option("--expires-at", type=Timestamp(), help="Expiry time, with a time zone: 2030-01-31T12:00:00Z.")
@click.option("--expires-in", type=Duration(), help="Validity from now: 90d, 12h, 30m.")
@json_option
@with_admin_client
def create_token(
    client: AdminClient,
    *,
    tenant: str,
    label: str | None,
    expires_at: datetime | None,
    expires_in: float | None,
    as_json: bool,
) -> None:
    """Create a token for TENANT and print it, once."""
    if expires_at and expires_in is not None:
        raise click.UsageError("Use --expires-at or --expires-in, not both.")
    now = datetime.now(UTC)
    if expires_in is not None:
        try:
            expires_at = now + timedelta(seconds=expires_in)
        except OverflowError:
            raise click.UsageError("--expires-in is too long: omit it for no expiry.") from None
    if expires_at and expires_at <= now:
        raise click.UsageError("The expiry time is in the past.")
    response = client.request("POST", "tenants", tenant, "tokens", body={"label": label, "expires_at": expires_at})
    if as_json:
        click.echo(response.format_json())
        return
    created = response.decode(NewToken)
    expiry = format_value(created.expires_at) if created.expires_at else "it is revoked"
    click.echo(f"Token {created.id} of {tenant}, valid until {expiry}. It is not shown again.", err=True)
    click.echo(created.token)


@token.command("list")
@click.argument("tenant")
@json_option
@with_admin_client
def list_tokens(client: AdminClient, *, tenant: str, as_json: bool) -> None:
    """List the valid tokens of TENANT."""
    response = client.request("GET", "tenants", tenant)
    tokens = response.decode(Tenant).tokens
    click.echo(response.with_members(items=tokens).format_json() if as_json else format_tokens(tokens))


@token.command("revoke")
@click.argument("tenant")
@click.argument("token_id", metavar="ID")
@click.option("--grace", type=Duration(), default=0, help="Time until it expires: 3600 (seconds), 1h, 7d.")
@with_admin_client
def revoke_token(client: AdminClient, *, tenant: str, token_id: str, grace: float) -> None:
    """Revoke the token ID of TENANT."""
    client.request("DELETE", "tenants", tenant, "tokens", token_id, grace=grace)
    status = f"expires in {grace:g} seconds" if grace else "is revoked"
    click.echo(f"The token {token_id} of {tenant} {status}.")


def format_tokens(tokens: Sequence[Token]) -> str:
    if not tokens:
        return "It has no tokens."
    rows = [(item.id, item.label, item.created_at, item.expires_at) for item in tokens]
    return format_table(("token", "label", "created at", "expires at"), rows)


def add_webhook_options(command: Callable[..., None]) -> Callable[..., None]:
    return reduce(lambda wrapped, option: option(wrapped), reversed(_WEBHOOK_OPTIONS), command)


def build_webhook_body(url: str | None, allow: Sequence[str], secret: BinaryIO | None) -> Mapping[str, Any] | None:
    """Return the webhook in the form of the operators' API. Raises UsageError."""
    if url is None:
        if allow or secret:
            raise click.UsageError("--webhook-allow and --webhook-secret-file need a --webhook-url.")
        return None
    body: dict[str, Any] = {"url": url, "allow": allow}
    if secret:
        body["secret"] = read_secret(secret, "--webhook-secret-file")
    return body


def webhook_fields(webhook: Webhook | None) -> Sequence[tuple[str, object]]:
    if webhook is None:
        return [("webhook", None)]
    return [
        ("webhook", webhook.url),
        ("webhook hosts", webhook.allow),
        ("disabled URLs", webhook.disabled_urls),
    ]


@click.group()
def webhook() -> None:
    """Manage webhooks, which report finished tasks to tenants."""


@webhook.command("rotate-secret")
@click.argument("tenant")
@click.option(
    "--grace", type=Duration(), default=0, show_default=True, help="Time for which the previous secret signs too: 7d."
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
webhook.add_command(LazyCommand("rotate", "service.cli.admin", attribute="rotate_webhook_secret"))


@webhook.command("failed")
@click.option("--limit", type=click.IntRange(1, 1_000), default=100, show_default=True, help="Maximum number.")
@json_option
@with_admin_client
def list_failed_deliveries(client: AdminClient, *, limit: int, as_json: bool) -> None:
    """List the failed deliveries of the last 30 days, newest first."""
    response = client.request("GET", "webhooks", "failed", limit=limit)
    print_response(response, DeliveryList, _format_deliveries, as_json=as_json)


@webhook.command("redeliver")
@click.argument("delivery", metavar="ID")
@json_option
@with_admin_client
def redeliver_webhook(client: AdminClient, *, delivery: str, as_json: bool) -> None:
    """Repeat the delivery ID msg_..., with all its attempts."""
    response = client.request("POST", "webhooks", delivery, "redeliver")
    print_response(response, Delivery, lambda item: _format_deliveries(DeliveryList([item])), as_json=as_json)


def _format_deliveries(deliveries: DeliveryList) -> str:
    head = ("id", "tenant", "state", "attempts", "status", "error", "url", "updated at")
    rows = [
        (item.id, item.tenant, item.state, item.attempts, item.status, item.error, item.url, item.updated_at)
        for item in deliveries.items
    ]
    return format_table(head, rows)


@click.group()
def tenant() -> None:
    """Manage tenants, which submit tasks."""


@tenant.command("set")
@click.argument("name")
@click.option(
    "--account", "accounts", multiple=True, required=True, help="An account to use; in order of preference, repeatable."
)
@click.option("--limit", "limits", type=Limit(), multiple=True, help="Limit of a window; repeatable.")
@click.option("--max-active", type=click.IntRange(min=0), help="Maximum number of tasks at once.")
@click.option("--spending-mode", type=_SPENDING_MODE, help="Prepaid uses only, or money after them.")
@click.option("--purse", "old_spending_mode", type=_SPENDING_MODE, hidden=True)  # the name in 0.2.0
@click.option("--kind", "kinds", type=_KIND, multiple=True, help="A kind it may submit; repeatable.")
@click.option(
    "--state", type=click.Choice(list(TenantStatus)), help="read-only refuses submissions, disabled every call."
)
@add_webhook_options
@json_option
@with_admin_client
def set_tenant(
    client: AdminClient,
    *,
    name: str,
    accounts: Sequence[str],
    limits: Sequence[Mapping[str, Any]],
    kinds: Sequence[str],
    webhook_url: str | None,
    webhook_allow: Sequence[str],
    webhook_secret_file: BinaryIO | None,
    spending_mode: str | None,
    old_spending_mode: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Create or replace the tenant NAME.

    Omitted options get their defaults; its tokens and its webhook secret are kept. A generated secret is printed.
    """
    webhook = build_webhook_body(webhook_url, webhook_allow, webhook_secret_file)
    if spending_mode := spending_mode or old_spending_mode:
        options["spending_mode"] = spending_mode
    body = {field: value for field, value in options.items() if value is not None}
    body |= {"accounts": accounts, "limits": limits, "kinds": kinds or None, "webhook": webhook}
    response = client.request("PUT", "tenants", name, body=body)
    print_response(response, Tenant, _format_tenant, as_json=as_json)
    stored = response.decode(Tenant).webhook
    if stored and stored.secret and not as_json:
        click.echo(f"\nThe secret of its webhooks, which is not shown again: {stored.secret}")


@tenant.command("list")
@json_option
@with_admin_client
def list_tenants(client: AdminClient, *, as_json: bool) -> None:
    """List the tenants."""
    print_response(client.request("GET", "tenants"), TenantList, _format_tenants, as_json=as_json)


def _format_tenants(tenants: TenantList) -> str:
    head = ("name", "accounts", "limits", "max active", "spending mode", "kinds", "tokens", "state")
    rows = [
        (
            item.name,
            item.accounts,
            [_format_limit(limit) for limit in item.limits],
            item.max_active,
            item.spending_mode,
            _format_kinds(item),
            len(item.tokens),
            item.state,
        )
        for item in tenants.items
    ]
    return format_table(head, rows)


@tenant.command("show")
@click.argument("name")
@json_option
@with_admin_client
def show_tenant(client: AdminClient, *, name: str, as_json: bool) -> None:
    """Show the tenant NAME, the use of its limits, and its tokens."""
    print_response(client.request("GET", "tenants", name), Tenant, _format_tenant, as_json=as_json)


@tenant.command("delete")
@click.argument("name")
@click.option("--force", is_flag=True, help="Even with running tasks.")
@with_admin_client
def delete_tenant(client: AdminClient, *, name: str, force: bool) -> None:
    """Delete the tenant NAME and its tokens."""
    client.request("DELETE", "tenants", name, force=force)
    click.echo(f"The tenant {name} is deleted.")


@click.command()
@click.argument("tenant")
@json_option
@with_admin_client
def quota(client: AdminClient, *, tenant: str, as_json: bool) -> None:
    """Show the limits of TENANT and their use."""
    response = client.request("GET", "tenants", tenant)
    policies = response.decode(Tenant).policies
    click.echo(response.with_members(policies=policies).format_json() if as_json else _format_policies(policies))


def _format_tenant(tenant: Tenant) -> str:
    record = format_record(
        ("name", tenant.name),
        ("accounts", tenant.accounts),
        ("spending mode", tenant.spending_mode),
        ("kinds", _format_kinds(tenant)),
        ("state", tenant.state),
        *webhook_fields(tenant.webhook),
    )
    return "\n\n".join([record, _format_policies(tenant.policies), format_tokens(tenant.tokens)])


def _format_policies(policies: Sequence[Policy]) -> str:
    if not policies:
        return "It has no limits."
    head = ("policy", "unit", "limit", "used", "reserved", "remaining", "overrun", "resets at")
    units = {"money": "yuan"}
    rows = [
        (
            item.policy,
            units.get(item.unit, item.unit),
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


def _format_limit(limit: admin_schemas.Limit) -> str:
    parts = {"tasks": limit.tasks, "yuan": limit.money}
    return f"{limit.window} " + " + ".join(f"{amount} {unit}" for unit, amount in parts.items() if amount is not None)


def _format_kinds(tenant: Tenant) -> object:
    return "all" if tenant.kinds is None else tenant.kinds or "none"


@click.group()
def clock() -> None:
    """Manage the clock of the ledger."""


@clock.command("reset")
@json_option
@with_admin_client
def reset_clock(client: AdminClient, *, as_json: bool) -> None:
    """Reset the clock of the ledger to the clock of Redis, with all due times.

    The ledger is ahead after the clock of Redis was set back, and by itself adjusts ten times as slowly.
    """
    response = client.request("POST", "clock", "reset")
    seconds = response.decode(ClockReset).offset_seconds
    click.echo(
        response.format_json() if as_json else f"The clock of the ledger was {seconds:g} s ahead of the clock of Redis."
    )
