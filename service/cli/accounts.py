"""`gateway account`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import click

from service.api.admin_schemas import AccountList, AccountView, FigureView
from service.cli import variable
from service.cli.client import NOT_FOUND, Answer, OperatorsPort, Refused, as_json, asking
from service.cli.shown import card, table
from service.cli.values import Price, Yuan, read_secret
from service.domain.tasks import Kind


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
@as_json
@asking
def set_account(
    port: OperatorsPort,
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
        body["user_key"] = _from_environment(user_key_env)
    elif user_key_file:
        body["user_key"] = read_secret(user_key_file, "--user-key-file")
    elif user_key_prompt or (sys.stdin.isatty() and not _exists(port, name)):
        body["user_key"] = click.prompt(f"The user_key of {name}", hide_input=True, err=True)
    _print_account(port.ask("PUT", "accounts", name, body=body), as_json=as_json)


@account.command("list")
@as_json
@asking
def list_accounts(port: OperatorsPort, *, as_json: bool) -> None:
    """List the accounts: what is known of their balance, and what is under way."""
    answer = port.ask("GET", "accounts")
    if as_json:
        click.echo(answer.pretty())
        return
    head = ("name", "state", "uses", "yuan", "seen at", "in flight", "unknown", "look again at")
    rows = [
        (each.name, each.state, *_figures(each), each.in_flight, each.unknown, each.look_again_at)
        for each in answer.read(AccountList).items
    ]
    click.echo(table(head, rows))


@account.command("show")
@click.argument("name")
@as_json
@asking
def show_account(port: OperatorsPort, *, name: str, as_json: bool) -> None:
    """Show the account NAME."""
    _print_account(port.ask("GET", "accounts", name), as_json=as_json)


@account.command("reopen")
@click.argument("name")
@as_json
@asking
def reopen(port: OperatorsPort, *, name: str, as_json: bool) -> None:
    """Look at the account NAME again now, though it was exhausted or invalid."""
    _print_account(port.ask("POST", "accounts", name, "reopen"), as_json=as_json)


@account.command("delete")
@click.argument("name")
@click.option("--force", is_flag=True, help="Even though tasks run on it or tenants use it.")
@asking
def delete_account(port: OperatorsPort, *, name: str, force: bool) -> None:
    """Delete the account NAME."""
    port.ask("DELETE", "accounts", name, force=force)
    click.echo(f"The account {name} is deleted.")


def _exists(port: OperatorsPort, name: str) -> bool:
    try:
        port.ask("GET", "accounts", name)
    except Refused as refusal:
        if refusal.status != NOT_FOUND:
            raise
        return False
    return True


def _from_environment(name: str) -> str:
    value = variable(name)
    if not value:
        raise click.BadParameter(f"there is no environment variable {name}", param_hint="--user-key-env")
    return value


def _print_account(answer: Answer, *, as_json: bool) -> None:
    click.echo(answer.pretty() if as_json else _card(answer.read(AccountView)))


def _card(account: AccountView) -> str:
    uses, yuan, seen_at = _figures(account)
    return card(
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
        ("last price", _prices(account.prices)),
        ("free looks", account.looks),
        ("base URL", account.base_url),
        ("floor of uses", account.floor_count),
        ("floor of yuan", account.floor_money),
        ("highest price", _prices(account.max_price)),
    )


def _prices(prices: Mapping[Kind, float]) -> Sequence[str]:
    return [f"{kind} {price} yuan" for kind, price in prices.items()]


def _figures(account: AccountView) -> tuple[object, object, object]:
    """The uses and the yuan left, and when the newer of them was seen."""
    figures: list[FigureView | None] = [account.remaining_count, account.remaining_money]
    uses, yuan = (each.value if each else None for each in figures)
    return uses, yuan, max((each.seen_at for each in figures if each and each.seen_at), default=None)
