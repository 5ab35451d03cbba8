"""`gateway clock`."""

from __future__ import annotations

import click

from service.api.admin import ClockResetView
from service.cli.client import OperatorsPort, as_json, asking


@click.group()
def clock() -> None:
    """The ledger's time."""


@clock.command("reset")
@as_json
@asking
def reset(port: OperatorsPort, *, as_json: bool) -> None:
    """Set the ledger's time back to the clock of Redis, with all that is due by it.

    It is ahead after that clock has stepped back, and makes it good by itself, ten times as slowly.
    """
    answer = port.ask("POST", "clock", "reset")
    seconds = answer.read(ClockResetView).offset_seconds
    click.echo(answer.pretty() if as_json else f"The ledger's time was {seconds:g} s ahead of the clock of Redis.")
