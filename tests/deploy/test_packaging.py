"""The version, and the checks of generated files."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from deploy.grafana.__main__ import main as write_dashboards
from deploy.helm.__main__ import main as write_chart
from deploy.reference import main as write_reference
from service import __version__

ROOT = Path(__file__).parents[2]


def test_version() -> None:
    """The version is that of the chart, and the newest of the changelog, whose versions descend."""
    chart = (ROOT / "deploy" / "helm" / "imaging-gateway" / "Chart.yaml").read_text("utf-8")
    assert re.findall(r'^appVersion: "?([\d.]+)', chart, re.MULTILINE) == [__version__]
    headings = re.findall(r"^## \[(.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased]"]
    assert released[0].startswith(f"{__version__}] - ")
    versions = [tuple(map(int, heading.partition("]")[0].split("."))) for heading in released]
    assert versions == sorted(set(versions), reverse=True)


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        (write_dashboards, "--folder", "tasks.json"),
        (write_chart, "--folder", "production.yaml"),
        (write_reference, "--root", "deploy/SETTINGS.md"),
    ],
)
def test_drift(tmp_path: Path, command: click.Command, option: str, name: str) -> None:
    """`make drift` fails for a file that is missing or changed, and writing all files fixes that."""
    (tmp_path / "deploy").mkdir()
    (tmp_path / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    file, arguments = tmp_path / name, [option, str(tmp_path)]

    def check() -> int:
        return CliRunner().invoke(command, [*arguments, "--check"]).exit_code

    assert check() == 1
    assert CliRunner().invoke(command, arguments).exit_code == 0
    assert check() == 0
    file.write_text(file.read_text("utf-8") + "\n", "utf-8")
    assert check() == 1
