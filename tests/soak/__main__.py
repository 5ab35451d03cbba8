"""`make soak`: mixed traffic for some minutes; fails if memory, descriptors, keys or latencies rise."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from pathlib import Path

import click

from tests.soak.report import draw, format_page, format_table
from tests.soak.run import run_soak

_RESULTS = Path(__file__).with_name("results")


@click.command()
@click.option("--seconds", type=click.FloatRange(30, 86_400), default=600, show_default=True, envvar="SOAK_SECONDS")
@click.option("--save", type=click.Path(path_type=Path), default=_RESULTS, help="Folder of the page and the plot.")
def main(seconds: float, save: Path) -> None:
    """Run mixed traffic on a gateway with its store and sandbox, and judge what rises."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that all processes are ended
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    result = run_soak(seconds, folder, click.echo)
    save.mkdir(parents=True, exist_ok=True)
    (save / "RESULTS.md").write_text(format_page(result))
    draw(result, save / "results.png")
    click.echo(f"\n{format_table(result)}")
    for fault in result.faults:
        click.echo(f"FAILED: {fault}")
    click.echo(f"The plot is {save / 'results.png'}.")
    if not result.has_passed:
        click.echo(f"The log of the gateway is in {folder}.")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
