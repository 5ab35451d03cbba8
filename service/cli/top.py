"""The command `top`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import suppress

import click
import msgspec

from service.cli.client import check_url, ops_url, read_admin_token
from service.cli.common import CommandError, load_settings
from service.cli.monitor import Figures, Monitor


@click.command()
@click.option(
    "--url",
    "urls",
    multiple=True,
    help="Address of an operators' port; repeatable, for several processes.  "
    "[default: from GATEWAY_OPS_HOST and GATEWAY_OPS_PORT]",
)
@click.option(
    "--interval", type=click.FloatRange(0.5, 3_600), default=2, show_default=True, help="Seconds between refreshes."
)
@click.option(
    "--once", is_flag=True, help="Print the figures of one interval, and exit; without a terminal the default."
)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON at each refresh; with --once only one.")
def top(urls: Sequence[str], interval: float, *, once: bool, as_json: bool) -> None:
    """Show what gateways do, live: requests, tasks, balances, denials. Ctrl-C ends it.

    Requests are of the last interval; denials, and the lateness of checks, of the last minute. The days left of an
    account are at the mean spending of the last 7 days of the tenants that use it now. Requests, uploads and denials
    are those of the processes named with --url; all else is of the whole gateway. With --once the exit code is 1 if no
    process responds.
    """
    settings = load_settings()
    addresses = [check_url(url) for url in urls or [ops_url(settings)]]
    once = once or not (as_json or sys.stdout.isatty())
    with suppress(KeyboardInterrupt):
        monitor = Monitor(addresses, read_admin_token(settings), settings.metrics_token)
        asyncio.run(_run(monitor, interval, once=once, as_json=as_json))


async def _run(monitor: Monitor, interval: float, *, once: bool, as_json: bool) -> None:
    async def read() -> Figures:
        await monitor.refresh()
        return monitor.figures()

    try:
        if not (once or as_json):
            from service.cli.screen import show_live

            await show_live(read, interval)
        await read()  # rates need another one
        while True:
            await asyncio.sleep(interval)
            figures = await read()
            _print(figures, as_json=as_json)
            if once:
                break
    finally:
        await monitor.aclose()
    if all(gateway.error for gateway in figures.gateways):
        raise CommandError(f"no gateway responds: {figures.gateways[0].error}")


def _print(figures: Figures, *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(figures))
        return
    from service.cli.screen import print_figures

    print_figures(figures)
