"""Commands for accounts, tenants, tokens and the clock."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import msgspec

from service.api import admin_schemas
from service.api.admin_schemas import (
    Account,
    AccountList,
    ClockReset,
    Figure,
    NewToken,
    RevokedTokens,
    Tenant,
    TenantList,
    Token,
)
from service.cli.client import AdminClient, AdminResponse, change_entry, print_response, with_admin_client
from service.cli.common import (
    add_options,
    clear_option,
    get_environment,
    json_option,
    named_fields,
    named_items,
    print_errors,
    removed_set,
)
from service.cli.formatting import (
    DURATION,
    LIMIT,
    PRICE,
    TIMESTAMP,
    YUAN,
    Fields,
    choice,
    format_json,
    format_record,
    format_table,
    format_value,
    read_secret,
)
from service.cli.reports import format_policies
from service.domain.tasks import Kind
from service.domain.tenants import SpendingMode, TenantStatus, Window

_NOTE_OPTION = click.option("--note", help="Free text about it; empty to remove it.")
_ACCOUNT_OPTIONS = (
    _NOTE_OPTION,
    click.option("--user-key-env", metavar="VARIABLE", help="Read the user_key from an environment variable."),
    click.option("--user-key-file", type=click.File("rb"), help="Read it from a file, or from standard input: `-`."),
    click.option("--user-key-prompt", is_flag=True, help="Prompt for it."),
    click.option(
        "--base-url",
        help="Address of its upstream; a new scheme, host or port needs the key.  [default: from GATEWAY_UPSTREAM_URL]",
    ),
    click.option("--floor-count", type=click.IntRange(min=0), help="Prepaid uses that must remain."),
    click.option("--floor-money", type=YUAN, help="Money that must remain."),
    click.option("--max-price", "prices", type=PRICE, multiple=True, help="Maximum price of a kind; repeatable."),
)
_TENANT_OPTIONS = (
    _NOTE_OPTION,
    click.option("--account", "accounts", multiple=True, help="An account to use; in order of preference, repeatable."),
    click.option(
        "--limit",
        "limits",
        type=LIMIT,
        multiple=True,
        help="Limit of a window, whose webhook warns at percentages such as 80/95; repeatable.",
    ),
    click.option("--max-active", type=click.IntRange(min=0), help="Maximum number of tasks at once."),
    click.option("--spending-mode", type=choice(SpendingMode), help="Prepaid uses only, or money after them."),
    click.option("--kind", "kinds", type=choice(Kind), multiple=True, help="A kind it may submit; repeatable."),
    click.option("--state", type=choice(TenantStatus), help="read-only refuses submissions, disabled every request."),
    click.option("--webhook-url", help="Address that receives the events of its tasks."),
    click.option(
        "--webhook-allow",
        multiple=True,
        help="A further host for its tasks, or a network for private addresses such as 10.0.0.0/8; with its port, such "
        "as 10.0.0.0/8:8080, unless that is 80 or 443; repeatable.",
    ),
    click.option(
        "--allow-image-url",
        multiple=True,
        metavar="HOST",
        help="A host from which its image_url is fetched, or a network for private addresses such as 10.0.0.0/8; with "
        "its port unless that is 80 or 443; repeatable.",
    ),
    click.option(
        "--webhook-secret-file",
        type=click.File("rb"),
        help="Read the whsec_ secret from a file, or from standard input with `-`.  [default: unchanged, or generated]",
    ),
)


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
        *_account_settings(account),
    )


def _account_settings(account: Account) -> Fields:
    return [
        ("base URL", account.base_url),
        ("minimum uses", account.floor_count),
        ("minimum yuan", account.floor_money),
        ("maximum price", _format_prices(account.max_price)),
        ("note", account.note),
    ]


def _format_prices(prices: Mapping[Kind, float]) -> Sequence[str]:
    return [f"{kind} {format_value(price)} yuan" for kind, price in prices.items()]


def _format_accounts(accounts: AccountList) -> str:
    head = ("name", "state", "uses", "yuan", "balance at", "in flight", "unknown", "next check at")
    rows = [
        (item.name, item.state, *_latest_balance(item), item.in_flight, item.unknown, item.look_again_at)
        for item in accounts.items
    ]
    return format_table(head, rows)


def _latest_balance(account: Account) -> tuple[object, object, object]:
    """Return the remaining uses and yuan, and the time of the newer reading."""
    readings: list[Figure | None] = [account.remaining_count, account.remaining_money]
    uses, yuan = (reading.value if reading else None for reading in readings)
    return uses, yuan, max((reading.seen_at for reading in readings if reading and reading.seen_at), default=None)


@click.group()
def account() -> None:
    """Manage accounts at the upstream."""


account.add_command(removed_set)


@account.command("create")
@click.argument("name")
@add_options(*_ACCOUNT_OPTIONS)
@print_response(Account, _format_account)
def create_account(
    client: AdminClient, *, name: str, prices: Sequence[tuple[str, float]], **options: Any
) -> AdminResponse:
    """Create the account NAME.

    Its key is no argument of the command line, since other users could read it there. Without an option for it, a
    terminal prompts for it.
    """
    key = _read_user_key(name, options, can_prompt=sys.stdin.isatty())
    body = named_fields({**options, "user_key": key, "max_price": named_items("--max-price", prices)})
    return client.create("accounts", name, body)


@account.command("update")
@click.argument("name")
@add_options(*_ACCOUNT_OPTIONS)
@clear_option("--no-base-url", "base_url", "Use the address of GATEWAY_UPSTREAM_URL.")
@click.option(
    "--no-max-price", "no_prices", type=choice(Kind), multiple=True, help="Remove the price of a kind; repeatable."
)
@json_option
@with_admin_client
def update_account(
    client: AdminClient,
    *,
    name: str,
    prices: Sequence[tuple[str, float]],
    no_prices: Sequence[str],
    as_json: bool,
    **options: Any,
) -> None:
    """Change the account NAME: only what the options name, and only the prices of the kinds named."""
    key = _read_user_key(name, options, can_prompt=False)
    patch = named_fields({**options, "user_key": key, "max_price": named_items("--max-price", prices, no_prices)})
    change_entry(client, ("accounts", name), (Account, _account_settings), lambda _: patch, as_json=as_json)


def _read_user_key(name: str, options: dict[str, Any], *, can_prompt: bool) -> str | None:
    """Take the options of the key out of `options`, and read it. Raises UsageError."""
    variable, file, prompt = (options.pop(f"user_key_{source}") for source in ("env", "file", "prompt"))
    if sum(map(bool, (variable, file, prompt))) > 1:
        raise click.UsageError("Use one of --user-key-env, --user-key-file and --user-key-prompt.")
    if file:
        return read_secret(file, "--user-key-file")
    if variable:
        if not (key := get_environment().get(variable)):
            raise click.BadParameter(f"there is no environment variable {variable}", param_hint="--user-key-env")
        return key
    if prompt or can_prompt:
        return str(click.prompt(f"The user_key of {name}", hide_input=True, err=True))
    return None


@account.command("list")
@print_response(AccountList, _format_accounts)
def list_accounts(client: AdminClient) -> AdminResponse:
    """List the accounts with their balances and tasks in flight."""
    return client.request("GET", "accounts")


@account.command("show")
@click.argument("name")
@print_response(Account, _format_account)
def show_account(client: AdminClient, *, name: str) -> AdminResponse:
    """Show the account NAME."""
    return client.request("GET", "accounts", name)


@account.command("reopen")
@click.argument("name")
@print_response(Account, _format_account)
def reopen_account(client: AdminClient, *, name: str) -> AdminResponse:
    """Use the account NAME again, though it was exhausted or invalid."""
    return client.request("POST", "accounts", name, "reopen")


@account.command("delete")
@click.argument("name")
@click.option("--force", is_flag=True, help="Even with running tasks or tenants.")
@json_option
@with_admin_client
def delete_account(client: AdminClient, *, name: str, force: bool, as_json: bool) -> None:
    """Delete the account NAME."""
    client.request("DELETE", "accounts", name, force=force)
    click.echo(format_json({"deleted": name}) if as_json else f"The account {name} is deleted.")


def _format_tokens(tokens: Sequence[Token]) -> str:
    if not tokens:
        return "It has no tokens."
    rows = [(item.id, item.label, item.created_at, item.expires_at) for item in tokens]
    return format_table(("token", "label", "created at", "expires at"), rows)


@click.group()
def token() -> None:
    """Manage the bearer tokens of tenants."""


@token.command("create")
@click.argument("tenant")
@click.option("--label", help="Its purpose.")
@click.option("--expires-at", type=TIMESTAMP, help="Expiry time, with a time zone: 2030-01-31T12:00:00Z.")
@click.option("--expires-in", type=DURATION, help="Validity from now: 90d, 12h, 30m.")
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
    click.echo(response.with_members(items=tokens).format_json() if as_json else _format_tokens(tokens))


@token.command("revoke")
@click.argument("tenant")
@click.argument("token_id", metavar="ID")
@click.option("--grace", type=DURATION, default="0", help="Time until it expires: 3600 (seconds), 1h, 7d.")
@json_option
@with_admin_client
def revoke_token(client: AdminClient, *, tenant: str, token_id: str, grace: float, as_json: bool) -> None:
    """Revoke the token ID of TENANT."""
    client.request("DELETE", "tenants", tenant, "tokens", token_id, grace=grace)
    if as_json:
        click.echo(format_json({"revoked": [token_id], "grace_seconds": grace}))
        return
    status = f"expires in {grace:g} seconds" if grace else "is revoked"
    click.echo(f"The token {token_id} of {tenant} {status}.")


def _format_tenant(tenant: Tenant) -> str:
    record = format_record(("name", tenant.name), *_tenant_settings(tenant))
    parts = [record, format_policies(tenant.policies), _format_tokens(tenant.tokens)]
    return "\n\n".join([*parts, *_format_warnings(tenant)])


def _format_warnings(tenant: Tenant) -> Iterator[str]:
    return (f"warning: {warning}" for warning in tenant.warnings)


def _tenant_settings(tenant: Tenant) -> Fields:
    webhook = tenant.webhook
    return [
        ("state", tenant.state),
        ("accounts", tenant.accounts),
        ("limits", [_format_limit(limit) for limit in tenant.limits]),
        ("max active", tenant.max_active),
        ("spending mode", tenant.spending_mode),
        ("kinds", _format_kinds(tenant)),
        ("webhook", webhook and webhook.url),
        ("webhook hosts", webhook and webhook.allow),
        ("disabled URLs", webhook and webhook.disabled_urls),
        ("image hosts", tenant.allow_image_url),
        ("note", tenant.note),
        *([("webhook secret, shown once", webhook.secret)] if webhook and webhook.secret else []),
    ]


def _format_limit(limit: admin_schemas.Limit) -> str:
    amounts = {"tasks": limit.tasks, "yuan": limit.money}
    parts = [f"{format_value(amount)} {unit}" for unit, amount in amounts.items() if amount is not None]
    warnings = f" (warn at {'/'.join(map(str, limit.warn_at))}%)" if limit.warn_at else ""
    return f"{limit.window} {' + '.join(parts)}{warnings}"


def _format_kinds(tenant: Tenant) -> object:
    return "all" if tenant.kinds is None else tenant.kinds or "none"


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


@click.group()
def tenant() -> None:
    """Manage tenants, which submit tasks."""


tenant.add_command(removed_set)


@tenant.command("create")
@click.argument("name")
@add_options(*_TENANT_OPTIONS)
@print_response(Tenant, _format_tenant)
def create_tenant(
    client: AdminClient, *, name: str, limits: Sequence[tuple[str, Any]], **options: Any
) -> AdminResponse:
    """Create the tenant NAME. A generated secret of its webhooks is printed once."""
    body = _tenant_fields(options) | {"limits": list(named_items("--limit", limits).values())}
    return client.create("tenants", name, body)


@tenant.command("update")
@click.argument("name")
@add_options(*_TENANT_OPTIONS)
@click.option(
    "--no-limit", "no_limits", type=choice(Window), multiple=True, help="Remove the limit of a window; repeatable."
)
@clear_option("--no-max-active", "max_active", "Remove the maximum number of tasks at once.")
@clear_option("--all-kinds", "kinds", "Allow all kinds.")
@clear_option("--no-webhook", "webhook", "Send no webhooks. Its secret is kept.")
@clear_option("--no-image-url", "allow_image_url", "Fetch no images from URLs.")
@json_option
@with_admin_client
def update_tenant(
    client: AdminClient,
    *,
    name: str,
    limits: Sequence[tuple[str, Any]],
    no_limits: Sequence[str],
    as_json: bool,
    **options: Any,
) -> None:
    """Change the tenant NAME: only what the options name.

    A --limit changes what it names of its window: the tasks, the money, the percentages that warn. `money=none` removes
    the money, `warn_at=none` the warnings, --no-limit the whole limit. The options --account, --kind, --webhook-allow
    and --allow-image-url each replace the whole list. The URL of a webhook enables it again after a response 410.
    """
    patch, changed_limits = _tenant_fields(options), named_items("--limit", limits, no_limits)

    def make_patch(current: Tenant) -> Mapping[str, Any]:
        if not changed_limits:
            return patch
        merged: dict[str, Any] = {limit.window: msgspec.to_builtins(limit) for limit in current.limits}
        for window, limit in changed_limits.items():
            merged[window] = limit and {**merged.get(window, {}), **limit}
        return patch | {"limits": [limit for limit in merged.values() if limit]}

    changed = change_entry(client, ("tenants", name), (Tenant, _tenant_settings), make_patch, as_json=as_json)
    if not as_json:
        print_errors(_format_warnings(changed))


@tenant.command("disable")
@click.argument("name")
@json_option
@with_admin_client
def disable_tenant(client: AdminClient, *, name: str, as_json: bool) -> None:
    """Refuse every request of the tenant NAME. Its running tasks continue."""
    patch = {"state": TenantStatus.DISABLED}
    change_entry(client, ("tenants", name), (Tenant, _tenant_settings), lambda _: patch, as_json=as_json)


@tenant.command("enable")
@click.argument("name")
@json_option
@with_admin_client
def enable_tenant(client: AdminClient, *, name: str, as_json: bool) -> None:
    """Accept the requests of the tenant NAME again."""
    patch = {"state": TenantStatus.ACTIVE}
    change_entry(client, ("tenants", name), (Tenant, _tenant_settings), lambda _: patch, as_json=as_json)


@tenant.command("revoke-all")
@click.argument("name")
@print_response(RevokedTokens, lambda result: f"Revoked: {format_value(result.revoked)}")
def revoke_all_tokens(client: AdminClient, *, name: str) -> AdminResponse:
    """Revoke all tokens of the tenant NAME at once."""
    return client.request("POST", "tenants", name, "revoke-all")


def _tenant_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Return the named fields, without limits, in the form of the operators' API. Raises UsageError."""
    secret = options.pop("webhook_secret_file")
    webhook = {
        "url": options.pop("webhook_url"),
        "allow": options.pop("webhook_allow"),
        "secret": secret and read_secret(secret, "--webhook-secret-file"),
    }
    return named_fields({**options, "webhook": named_fields(webhook)})


@tenant.command("list")
@print_response(TenantList, _format_tenants)
def list_tenants(client: AdminClient) -> AdminResponse:
    """List the tenants."""
    return client.request("GET", "tenants")


@tenant.command("show")
@click.argument("name")
@print_response(Tenant, _format_tenant)
def show_tenant(client: AdminClient, *, name: str) -> AdminResponse:
    """Show the tenant NAME, the use of its limits, and its tokens."""
    return client.request("GET", "tenants", name)


@tenant.command("delete")
@click.argument("name")
@click.option("--force", is_flag=True, help="Even with running tasks.")
@json_option
@with_admin_client
def delete_tenant(client: AdminClient, *, name: str, force: bool, as_json: bool) -> None:
    """Delete the tenant NAME and its tokens."""
    client.request("DELETE", "tenants", name, force=force)
    click.echo(format_json({"deleted": name}) if as_json else f"The tenant {name} is deleted.")


@click.group()
def clock() -> None:
    """Manage the clock of the ledger."""


@clock.command("reset")
@print_response(
    ClockReset, lambda reset: f"The clock of the ledger was {reset.offset_seconds:g} s ahead of the clock of Redis."
)
def reset_clock(client: AdminClient) -> AdminResponse:
    """Reset the clock of the ledger to the clock of Redis, with all due times.

    The ledger is ahead after the clock of Redis was set back, and by itself adjusts ten times as slowly.
    """
    return client.request("POST", "clock", "reset")
