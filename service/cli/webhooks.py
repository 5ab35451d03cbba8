"""`gateway webhook`, and the webhook of `gateway tenant set`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, BinaryIO

import click

from service.api.admin_schemas import DeliveryList, DeliveryView, NewSecretView, WebhookView
from service.cli.client import OperatorsPort, as_json, asking
from service.cli.shown import table, text
from service.cli.values import Duration, read_secret

_OPTIONS = (
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


def webhook_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take a webhook."""
    return reduce(lambda wrapped, option: option(wrapped), reversed(_OPTIONS), command)


def webhook_body(url: str | None, allow: Sequence[str], secret: BinaryIO | None) -> Mapping[str, Any] | None:
    """A webhook as the operators' API takes it, out of what was given on the command line."""
    if url is None:
        if allow or secret:
            raise click.UsageError("--webhook-allow and --webhook-secret-file need a --webhook-url.")
        return None
    body: dict[str, Any] = {"url": url, "allow": allow}
    if secret:
        body["secret"] = read_secret(secret, "--webhook-secret-file")
    return body


def webhook_lines(webhook: WebhookView | None) -> Sequence[tuple[str, object]]:
    """A webhook as lines of a card."""
    if webhook is None:
        return [("webhook", None)]
    return [
        ("webhook", webhook.url),
        ("webhook hosts", webhook.allow),
        ("switched off", webhook.switched_off),
    ]


@click.group()
def webhook() -> None:
    """What tenants are told when their tasks end."""


@webhook.command("rotate")
@click.argument("tenant")
@click.option("--grace", type=Duration(), default=0, show_default=True, help="How long the one before signs too: 7d.")
@as_json
@asking
def rotate(port: OperatorsPort, *, tenant: str, grace: float, as_json: bool) -> None:
    """Make a new secret for the webhooks of TENANT, and print it: it is shown this once."""
    answer = port.ask("POST", "tenants", tenant, "webhook-secret", grace=grace)
    if as_json:
        click.echo(answer.pretty())
        return
    made = answer.read(NewSecretView)
    both = f" The one before signs too until {text(made.former_until)}." if grace else ""
    click.echo(f"The new secret of {tenant}. It is not shown again.{both}", err=True)
    click.echo(made.secret)


@webhook.command("failed")
@click.option("--limit", type=click.IntRange(1, 1_000), default=100, show_default=True, help="How many at the most.")
@as_json
@asking
def failed(port: OperatorsPort, *, limit: int, as_json: bool) -> None:
    """List what could not be delivered in the last 30 days, newest first."""
    answer = port.ask("GET", "webhooks", "failed", limit=limit)
    click.echo(answer.pretty() if as_json else _deliveries(answer.read(DeliveryList).items))


@webhook.command("redeliver")
@click.argument("delivery", metavar="ID")
@as_json
@asking
def redeliver(port: OperatorsPort, *, delivery: str, as_json: bool) -> None:
    """Send what has the ID msg_... again, from the start."""
    answer = port.ask("POST", "webhooks", delivery, "redeliver")
    click.echo(answer.pretty() if as_json else _deliveries([answer.read(DeliveryView)]))


def _deliveries(items: Sequence[DeliveryView]) -> str:
    head = ("id", "tenant", "state", "attempts", "status", "error", "url", "updated at")
    rows = [
        (each.id, each.tenant, each.state, each.attempts, each.status, each.error, each.url, each.updated_at)
        for each in items
    ]
    return table(head, rows)
