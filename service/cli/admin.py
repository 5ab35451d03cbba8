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
from service.cli.client import NOT_FOUND, AdminClient, AdminResponse, ProblemError, json_option, with_admin_client
from service.cli.common import read_environment
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
from service.domain.tenants import SpendingMode


@click.group()
def account() -> None:
    """Accounts at the upstream."""


@account.command("set")
@click.argument("name")
@click.option("--user-key-env", metavar="VARIABLE", help="Take the upstream's key from an environment variable.")
@click.option("--user-key-file", type=click.File("rb"), help="Take it from a file, or from standard input with `-`.")
@click.option("--user-key-prompt", is_flag=True, help="Ask for it.  [default: for a new account, on a terminal]")
@click.option("--base-url", help="Where the account is, if not at the usual upstream.")
@click.option("--floor-count", type=click.IntRange(min=0), help="How many uses must stay in the account.")
@click.option("--floor-money", type=Yuan(), help="How much money must stay in it.")
@click.option("--max-price", type=Price(), multiple=True, help="The most that a task of a kind can cost; repeatable.")
@json_option
@with_admin_client
def set_account(
    port: AdminClient,
    *,
    name: str,
    user_key_env: str | None,
    user_key_file: BinaryIO | None,
    user_key_prompt: bool,
    max_price: Sequence[tuple[str, float]],
    as_json: bool,
    **given: Any,
) -> None:
    """Make or replace the account NAME.

    What is left out gets its default; only the key is kept. A key is never written on the command line, where others
    could read it.
    """
    if sum(map(bool, (user_key_env, user_key_file, user_key_prompt))) > 1:
        raise click.UsageError("Take the key from one place: --user-key-env, --user-key-file or --user-key-prompt.")
    body = {field: value for field, value in given.items() if value is not None} | {"max_price": dict(max_price)}
    if user_key_env:
        body["user_key"] = _read_key_variable(user_key_env)
    elif user_key_file:
        body["user_key"] = read_secret(user_key_file, "--user-key-file")
    elif user_key_prompt or (sys.stdin.isatty() and not _account_exists(port, name)):
        body["user_key"] = click.prompt(f"The user_key of {name}", hide_input=True, err=True)
    _print_account(port.request("PUT", "accounts", name, body=body), as_json=as_json)


@account.command("list")
@json_option
@with_admin_client
def list_accounts(port: AdminClient, *, as_json: bool) -> None:
    """List the accounts: what is known of their balance, and what is under way."""
    answer = port.request("GET", "accounts")
    if as_json:
        click.echo(answer.format_json())
        return
    head = ("name", "state", "uses", "yuan", "seen at", "in flight", "unknown", "look again at")
    rows = [
        (each.name, each.state, *_latest_balance(each), each.in_flight, each.unknown, each.look_again_at)
        for each in answer.decode(AccountList).items
    ]
    click.echo(format_table(head, rows))


@account.command("show")
@click.argument("name")
@json_option
@with_admin_client
def show_account(port: AdminClient, *, name: str, as_json: bool) -> None:
    """Show the account NAME."""
    _print_account(port.request("GET", "accounts", name), as_json=as_json)


@account.command("reopen")
@click.argument("name")
@json_option
@with_admin_client
def reopen_account(port: AdminClient, *, name: str, as_json: bool) -> None:
    """Look at the account NAME again now, though it was exhausted or invalid."""
    _print_account(port.request("POST", "accounts", name, "reopen"), as_json=as_json)


@account.command("delete")
@click.argument("name")
@click.option("--force", is_flag=True, help="Even though tasks run on it or tenants use it.")
@with_admin_client
def delete_account(port: AdminClient, *, name: str, force: bool) -> None:
    """Delete the account NAME."""
    port.request("DELETE", "accounts", name, force=force)
    click.echo(f"The account {name} is deleted.")


def _account_exists(port: AdminClient, name: str) -> bool:
    try:
        port.request("GET", "accounts", name)
    except ProblemError as refusal:
        if refusal.status != NOT_FOUND:
            raise
        return False
    return True


def _read_key_variable(name: str) -> str:
    value = read_environment(name)
    if not value:
        raise click.BadParameter(f"there is no environment variable {name}", param_hint="--user-key-env")
    return value


def _print_account(answer: AdminResponse, *, as_json: bool) -> None:
    click.echo(answer.format_json() if as_json else _format_account(answer.decode(Account)))


def _format_account(account: Account) -> str:
    uses, yuan, seen_at = _latest_balance(account)
    return format_record(
        ("name", account.name),
        ("state", account.state),
        ("look again at", account.look_again_at),
        ("uses left", uses),
        ("yuan left", yuan),
        ("seen at", seen_at),
        ("in flight", account.in_flight),
        ("unknown", account.unknown),
        ("unexplained uses", account.unexplained.count),
        ("unexplained yuan", account.unexplained.money),
        ("last price", _format_prices(account.prices)),
        ("free looks", account.live_balance_checks),
        ("base URL", account.base_url),
        ("floor of uses", account.floor_count),
        ("floor of yuan", account.floor_money),
        ("highest price", _format_prices(account.max_price)),
    )


def _format_prices(prices: Mapping[Kind, float]) -> Sequence[str]:
    return [f"{kind} {price} yuan" for kind, price in prices.items()]


def _latest_balance(account: Account) -> tuple[object, object, object]:
    """The uses and the yuan left, and when the newer of them was seen."""
    figures: list[Figure | None] = [account.remaining_count, account.remaining_money]
    uses, yuan = (each.value if each else None for each in figures)
    return uses, yuan, max((each.seen_at for each in figures if each and each.seen_at), default=None)


@click.group()
def token() -> None:
    """Tokens, with which tenants show who they are."""


@token.command("create")
@click.argument("tenant")
@click.option("--label", help="What it is for.")
@click.option(
    "--expires-at", type=Timestamp(), help="When it ends to be valid, with a time zone: 2030-01-31T12:00:00Z."
)
@click.option("--expires-in", type=Duration(), help="How long it is valid: 90d, 12h, 30m.")
@json_option
@with_admin_client
def create_token(
    port: AdminClient,
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
    answer = port.request("POST", "tenants", tenant, "tokens", body={"label": label, "expires_at": expires_at})
    if as_json:
        click.echo(answer.format_json())
        return
    made = answer.decode(NewToken)
    until = f"valid until {format_value(made.expires_at)}" if made.expires_at else "valid until it is revoked"
    click.echo(f"Token {made.id} of {tenant}, {until}. It is not shown again.", err=True)
    click.echo(made.token)


@token.command("list")
@click.argument("tenant")
@json_option
@with_admin_client
def list_tokens(port: AdminClient, *, tenant: str, as_json: bool) -> None:
    """List the tokens of TENANT that have not expired."""
    answer = port.request("GET", "tenants", tenant)
    tokens = answer.decode(Tenant).tokens
    click.echo(answer.with_members(items=tokens).format_json() if as_json else format_tokens(tokens))


@token.command("revoke")
@click.argument("tenant")
@click.argument("token_id", metavar="ID")
@click.option("--grace", type=Duration(), default=0, help="How long it stays valid yet: 3600 (seconds), 1h, 7d.")
@with_admin_client
def revoke_token(port: AdminClient, *, tenant: str, token_id: str, grace: float) -> None:
    """Revoke the token ID of TENANT."""
    port.request("DELETE", "tenants", tenant, "tokens", token_id, grace=grace)
    when = f"ends in {grace:g} seconds" if grace else "is revoked"
    click.echo(f"The token {token_id} of {tenant} {when}.")


def format_tokens(tokens: Sequence[Token]) -> str:
    """The tokens of a tenant, by what is known of them."""
    if not tokens:
        return "It has no token."
    rows = [(each.id, each.label, each.created_at, each.expires_at) for each in tokens]
    return format_table(("token", "label", "created at", "expires at"), rows)


_WEBHOOK_OPTIONS = (
    click.option("--webhook-url", help="Where it is told of the ends of its tasks."),
    click.option(
        "--webhook-allow",
        multiple=True,
        help="A host that its tasks may name too, or a network such as 127.0.0.0/8 in which hosts may be; repeatable.",
    ),
    click.option(
        "--webhook-secret-file",
        type=click.File("rb"),
        help="Take the whsec_ secret from a file, or from standard input with `-`.  [default: as it was, or a new one]",
    ),
)


def add_webhook_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take a webhook."""
    return reduce(lambda wrapped, option: option(wrapped), reversed(_WEBHOOK_OPTIONS), command)


def build_webhook_body(url: str | None, allow: Sequence[str], secret: BinaryIO | None) -> Mapping[str, Any] | None:
    """A webhook as the operators' API takes it, out of what was given on the command line."""
    if url is None:
        if allow or secret:
            raise click.UsageError("--webhook-allow and --webhook-secret-file need a --webhook-url.")
        return None
    body: dict[str, Any] = {"url": url, "allow": allow}
    if secret:
        body["secret"] = read_secret(secret, "--webhook-secret-file")
    return body


def webhook_fields(webhook: Webhook | None) -> Sequence[tuple[str, object]]:
    """A webhook as lines of a card."""
    if webhook is None:
        return [("webhook", None)]
    return [
        ("webhook", webhook.url),
        ("webhook hosts", webhook.allow),
        ("switched off", webhook.disabled_urls),
    ]


@click.group()
def webhook() -> None:
    """What tenants are told when their tasks end."""


@webhook.command("rotate")
@click.argument("tenant")
@click.option("--grace", type=Duration(), default=0, show_default=True, help="How long the one before signs too: 7d.")
@json_option
@with_admin_client
def rotate_webhook_secret(port: AdminClient, *, tenant: str, grace: float, as_json: bool) -> None:
    """Make a new secret for the webhooks of TENANT, and print it: it is shown this once."""
    answer = port.request("POST", "tenants", tenant, "webhook-secret", grace=grace)
    if as_json:
        click.echo(answer.format_json())
        return
    made = answer.decode(NewSecret)
    both = f" The one before signs too until {format_value(made.previous_expires_at)}." if grace else ""
    click.echo(f"The new secret of {tenant}. It is not shown again.{both}", err=True)
    click.echo(made.secret)


@webhook.command("failed")
@click.option("--limit", type=click.IntRange(1, 1_000), default=100, show_default=True, help="How many at the most.")
@json_option
@with_admin_client
def list_failed_deliveries(port: AdminClient, *, limit: int, as_json: bool) -> None:
    """List what could not be delivered in the last 30 days, newest first."""
    answer = port.request("GET", "webhooks", "failed", limit=limit)
    click.echo(answer.format_json() if as_json else _format_deliveries(answer.decode(DeliveryList).items))


@webhook.command("redeliver")
@click.argument("delivery", metavar="ID")
@json_option
@with_admin_client
def redeliver_webhook(port: AdminClient, *, delivery: str, as_json: bool) -> None:
    """Send what has the ID msg_... again, from the start."""
    answer = port.request("POST", "webhooks", delivery, "redeliver")
    click.echo(answer.format_json() if as_json else _format_deliveries([answer.decode(Delivery)]))


def _format_deliveries(items: Sequence[Delivery]) -> str:
    head = ("id", "tenant", "state", "attempts", "status", "error", "url", "updated at")
    rows = [
        (each.id, each.tenant, each.state, each.attempts, each.status, each.error, each.url, each.updated_at)
        for each in items
    ]
    return format_table(head, rows)


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
    type=click.Choice([each.value for each in SpendingMode]),
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
@add_webhook_options
@json_option
@with_admin_client
def set_tenant(
    port: AdminClient,
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
    webhook = build_webhook_body(webhook_url, webhook_allow, webhook_secret_file)
    body = {field: value for field, value in given.items() if value is not None}
    body |= {"accounts": accounts, "limits": limits, "kinds": kinds or None, "webhook": webhook}
    answer = port.request("PUT", "tenants", name, body=body)
    _print_tenant(answer, as_json=as_json)
    made = answer.decode(Tenant).webhook
    if made and made.secret and not as_json:
        click.echo(f"\nThe secret of its webhooks, which is not shown again: {made.secret}")


@tenant.command("list")
@json_option
@with_admin_client
def list_tenants(port: AdminClient, *, as_json: bool) -> None:
    """List the tenants."""
    answer = port.request("GET", "tenants")
    if as_json:
        click.echo(answer.format_json())
        return
    head = ("name", "accounts", "limits", "max active", "purse", "kinds", "tokens", "disabled")
    rows = [
        (
            each.name,
            each.accounts,
            _format_limits(each),
            each.max_active,
            each.spending_mode,
            _format_kinds(each),
            len(each.tokens),
            each.disabled,
        )
        for each in answer.decode(TenantList).items
    ]
    click.echo(format_table(head, rows))


@tenant.command("show")
@click.argument("name")
@json_option
@with_admin_client
def show_tenant(port: AdminClient, *, name: str, as_json: bool) -> None:
    """Show the tenant NAME, what it has used, and its tokens."""
    _print_tenant(port.request("GET", "tenants", name), as_json=as_json)


@tenant.command("delete")
@click.argument("name")
@click.option("--force", is_flag=True, help="Even though its tasks run.")
@with_admin_client
def delete_tenant(port: AdminClient, *, name: str, force: bool) -> None:
    """Delete the tenant NAME and its tokens."""
    port.request("DELETE", "tenants", name, force=force)
    click.echo(f"The tenant {name} is deleted.")


@with_admin_client
def show_quota(port: AdminClient, *, name: str, as_json: bool) -> None:
    """Show how the policies of a tenant stand."""
    answer = port.request("GET", "tenants", name)
    policies = answer.decode(Tenant).policies
    click.echo(answer.with_members(policies=policies).format_json() if as_json else _format_policies(policies))


def _print_tenant(answer: AdminResponse, *, as_json: bool) -> None:
    click.echo(answer.format_json() if as_json else _format_tenant(answer.decode(Tenant)))


def _format_tenant(tenant: Tenant) -> str:
    about = format_record(
        ("name", tenant.name),
        ("accounts", tenant.accounts),
        ("purse", tenant.spending_mode),
        ("kinds", _format_kinds(tenant)),
        ("disabled", tenant.disabled),
        *webhook_fields(tenant.webhook),
    )
    return "\n\n".join([about, _format_policies(tenant.policies), format_tokens(tenant.tokens)])


def _format_policies(policies: Sequence[Policy]) -> str:
    if not policies:
        return "Nothing limits it."
    head = ("policy", "unit", "limit", "used", "reserved", "remaining", "overrun", "resets at")
    return format_table(
        head,
        [
            (
                each.policy,
                _display_unit(each),
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


def _display_unit(policy: Policy) -> str:
    return "yuan" if policy.unit == "money" else policy.unit


def _format_limits(tenant: Tenant) -> Sequence[str]:
    return [_format_limit(each) for each in tenant.limits]


def _format_limit(limit: admin_schemas.Limit) -> str:
    parts = {"tasks": limit.tasks, "yuan": limit.money}
    return f"{limit.window} " + " + ".join(f"{most} {unit}" for unit, most in parts.items() if most is not None)


def _format_kinds(tenant: Tenant) -> object:
    return "all" if tenant.kinds is None else tenant.kinds or "none"


@click.group()
def clock() -> None:
    """The ledger's time."""


@clock.command("reset")
@json_option
@with_admin_client
def reset_clock(port: AdminClient, *, as_json: bool) -> None:
    """Set the ledger's time back to the clock of Redis, with all that is due by it.

    It is ahead after that clock has stepped back, and makes it good by itself, ten times as slowly.
    """
    answer = port.request("POST", "clock", "reset")
    seconds = answer.decode(ClockReset).offset_seconds
    click.echo(answer.format_json() if as_json else f"The ledger's time was {seconds:g} s ahead of the clock of Redis.")
