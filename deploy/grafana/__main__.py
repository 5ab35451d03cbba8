"""Write the dashboards, or check that those that are there are what would be written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from deploy.grafana.service import SERVICE
from deploy.grafana.tasks import TASKS
from deploy.grafana.tenants import TENANTS
from deploy.grafana.upstream import UPSTREAM

FOLDER = Path(__file__).parent / "dashboards"


def render_all() -> dict[str, str]:
    """The text of each dashboard, by the name of its file."""
    return {f"{board.name}.json": board.render() for board in (SERVICE, TENANTS, UPSTREAM, TASKS)}


def find_drift(folder: Path) -> Iterable[str]:
    """The names of files in a folder that are not what would be written: missing, different, or no longer wanted."""
    wanted = render_all()
    there = {each.name: each.read_text("utf-8") for each in folder.glob("*.json")}
    return sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))


def write_dashboards(folder: Path) -> None:
    """Make a folder hold the dashboards, and no others."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in find_drift(folder):
        if text := render_all().get(name):
            (folder / name).write_text(text, "utf-8")
        else:
            (folder / name).unlink()


@click.command("python -m deploy.grafana")
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER, help="Where the dashboards are.")
@click.option("--check", is_flag=True, help="Write nothing; fail if anything would be written.")
def main(*, folder: Path, check: bool) -> None:
    """Write the dashboards of the gateway as Grafana imports them."""
    if not check:
        write_dashboards(folder)
        return
    names = find_drift(folder)
    if names:
        raise click.ClickException(
            f"not what the code says: {', '.join(names)}; python -m deploy.grafana rewrites them"
        )


if __name__ == "__main__":
    main()
