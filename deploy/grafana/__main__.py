"""Write the dashboards, or check that the files are up to date."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from deploy.grafana.now import NOW
from deploy.grafana.service import SERVICE
from deploy.grafana.tasks import TASKS
from deploy.grafana.tenants import TENANTS
from deploy.grafana.upstream import UPSTREAM

FOLDER = Path(__file__).parent / "dashboards"


def render_all() -> dict[str, str]:
    """Return the text of each dashboard by file name."""
    return {f"{dashboard.name}.json": dashboard.render() for dashboard in (NOW, SERVICE, TENANTS, UPSTREAM, TASKS)}


def find_drift(folder: Path) -> Iterable[str]:
    """Return the names of files that are missing, different or superfluous."""
    expected = render_all()
    actual = {path.name: path.read_text("utf-8") for path in folder.glob("*.json")}
    return sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))


def write_dashboards(folder: Path) -> None:
    """Write the dashboards, and delete all others in the folder."""
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
    """Write the Grafana dashboards of the gateway."""
    if not check:
        write_dashboards(folder)
        return
    names = find_drift(folder)
    if names:
        raise click.ClickException(f"not up to date: {', '.join(names)}; python -m deploy.grafana rewrites them")


if __name__ == "__main__":
    main()
