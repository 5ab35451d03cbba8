"""Runs all benchmarks, or those that are named."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import click

from tests.bench.figures import Benchmark, table
from tests.bench.ledger import ledger
from tests.bench.memory import memory
from tests.bench.scraping import scraping, watched
from tests.bench.waiting import waiting
from tests.bench.watching import watching

BENCHMARKS: Mapping[str, Benchmark] = {
    "ledger": ledger,
    "memory": memory,
    "waiting": waiting,
    "watching": watching,
    "scraping": scraping,
    "watched": watched,
}


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
def main(names: tuple[str, ...]) -> None:
    for name in names or BENCHMARKS:
        click.echo(f"{name}: {(BENCHMARKS[name].__doc__ or '').splitlines()[0]}")
        click.echo(table(asyncio.run(BENCHMARKS[name]())))


if __name__ == "__main__":
    main()
