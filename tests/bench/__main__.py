"""Compare the whole gateway with what a team would run instead.

workloads.py      the workloads by name, in their order; overload.py and stored_tasks.py have some of them
targets.py        the figures that the gateway has to reach
comparison.py     a run: CPUs, rounds, results; the servers to compare and their environment
peers/            the vendor's stub, the references, and processes pinned to a CPU
load.py, wrk.lua  requests, PNGs of random pixels, and the load generators
report.py         tables, JSON, the results file and the plot
results/          the results of a run
scaling.py        a run of its own: costs against tenants and tasks, of a store that seeding.py fills; scaling_report.py
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click

from tests.bench.comparison import Comparison
from tests.bench.peers.servers import require_tools
from tests.bench.report import add_ratios, describe_run, draw, format_json, format_page, format_tables
from tests.bench.workloads import QUICK, WORKLOADS

RESULTS = Path(__file__).with_name("results")


@click.command(help="Compare the gateway with what a team would run instead.")
@click.option("--quick", is_flag=True, help="The main rows in three minutes, printed only.")
@click.option("--rows", multiple=True, type=click.Choice(tuple(WORKLOADS)), help="Only these.")
@click.option(
    "--against",
    type=click.Path(exists=True, file_okay=False, path_type=Path, resolve_path=True),
    help="Another checkout with its own .venv: its gateway is measured in the same rounds.",
)
@click.option("--rounds", type=click.IntRange(1, 99), default=3, show_default=True, help="How often servers alternate.")
@click.option("--seconds", type=click.IntRange(1, 60), help="How long a closed loop takes: 3, in the quick one 2.")
@click.option(
    "--save",
    type=click.Path(file_okay=False, path_type=Path),
    is_flag=False,
    flag_value=RESULTS,
    help=f"Write the results into this folder; without a name into {RESULTS.parent.name}/{RESULTS.name}/.",
)
def main(
    *, quick: bool, rows: tuple[str, ...], against: Path | None, rounds: int, seconds: int | None, save: Path | None
) -> None:
    require_tools()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all servers are stopped
    chosen = rows or (QUICK if quick else tuple(WORKLOADS))
    failed = []
    comparison = Comparison(against=against, rounds=rounds, seconds=seconds or (2 if quick else 3), quick=quick)
    facts = describe_run(comparison)
    with comparison:
        for name, workload in WORKLOADS.items():
            if name in chosen:
                comparison.title = workload.__doc__ or ""
                click.echo(f"{name}: {comparison.title}", err=True)
                try:
                    workload(comparison)
                except Exception as error:  # noqa: BLE001 - what was measured so far is not lost
                    failed.append(name)
                    click.echo(f"{name} FAILED: {error!r}", err=True)
    results = add_ratios(comparison.results())
    tables = format_tables(results, comparison.titles)
    click.echo(tables)
    if save:
        save.mkdir(parents=True, exist_ok=True)
        (save / "results.json").write_text(format_json(facts, results))
        (save / "RESULTS.md").write_text(format_page(facts, tables))
        draw(results, f"Gateway {facts['commit']} beside its references, {facts['date']}", save / "results.png")
    if failed:
        raise click.ClickException(f"these workloads failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
