"""Render the chart with two of its examples, or check that the files are up to date."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import click
import yaml

from deploy.helm.chart import EXAMPLES, Resource, render

FOLDER = Path(__file__).parents[2] / "tests" / "deploy" / "golden"
EXAMPLES_TO_REVIEW = ("default", "production")
"""The others differ only in the peers and ports of Redis."""
_COPIED_FROM = "as in deploy/"


class _Dumper(yaml.SafeDumper):
    """Dumps multi-line strings as blocks."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def render_all() -> Mapping[str, str]:
    """Return the text of each file by name, its resources sorted by kind and name."""
    return {f"{name}.yaml": _format_resources(render(EXAMPLES[name])) for name in EXAMPLES_TO_REVIEW}


def find_drift(folder: Path, expected: Mapping[str, str]) -> Iterable[str]:
    """Return the names of files that are missing, different or superfluous."""
    actual = {path.name: path.read_text("utf-8") for path in folder.glob("*.yaml")}
    return sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))


def write_examples(folder: Path, expected: Mapping[str, str]) -> None:
    """Write these files, and delete all others in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in find_drift(folder, expected):
        if name in expected:
            (folder / name).write_text(expected[name], "utf-8")
        else:
            (folder / name).unlink()


def _format_resources(resources: Iterable[Resource]) -> str:
    ordered = sorted(resources, key=lambda resource: (resource["kind"], resource["metadata"]["name"]))
    shortened = [_omit_copies(resource) for resource in ordered]
    text: str = yaml.dump_all(
        shortened, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, explicit_start=True
    )
    return text


def _omit_copies(resource: Resource) -> Resource:
    """Shorten a resource whose content is copied from another folder and changes with that."""
    if resource["kind"] == "PrometheusRule":
        return {**resource, "spec": f"{_COPIED_FROM}prometheus"}
    if "-dashboard-" in resource["metadata"]["name"]:
        return {**resource, "data": dict.fromkeys(resource["data"], f"{_COPIED_FROM}grafana/dashboards")}
    return resource


@click.command("python -m deploy.helm")
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER, help="Where the files are.")
@click.option("--check", is_flag=True, help="Write nothing; fail if anything would be written.")
def main(*, folder: Path, check: bool) -> None:
    """Render the chart with the examples `default` and `production`, to review changes of the result."""
    expected = render_all()
    if not check:
        write_examples(folder, expected)
        return
    names = find_drift(folder, expected)
    if names:
        raise click.ClickException(f"not up to date: {', '.join(names)}; python -m deploy.helm rewrites them")


if __name__ == "__main__":
    main()
