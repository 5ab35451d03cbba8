"""The version, and the checks of generated files."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from deploy import packages
from deploy.grafana.__main__ import main as write_dashboards
from deploy.helm.__main__ import main as write_chart
from deploy.reference import main as write_reference
from service import __version__

ROOT = Path(__file__).parents[2]


def test_version() -> None:
    """The version is that of the chart and the released documents, and the newest of the changelog, which descend."""
    chart = (ROOT / "deploy" / "helm" / "imaging-gateway" / "Chart.yaml").read_text("utf-8")
    assert re.findall(r'^appVersion: "?([\d.]+)', chart, re.MULTILINE) == [__version__]
    for document in (ROOT / "openapi" / "released").glob("*.yaml"):
        assert f"\n  version: {__version__}\n" in document.read_text("utf-8")
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
    file, arguments = tmp_path / name, [option, str(tmp_path)]

    def check() -> int:
        return CliRunner().invoke(command, [*arguments, "--check"]).exit_code

    assert check() == 1
    assert CliRunner().invoke(command, arguments).exit_code == 0
    assert check() == 0
    file.write_text(file.read_text("utf-8") + "\n", "utf-8")
    assert check() == 1


def test_list_of_packages(tmp_path: Path) -> None:
    """`make sbom` lists what the image contains, with versions and hashes, and no tool of developers."""
    (uv,) = (ROOT / ".tools").glob("uv-*")
    document = json.loads(packages.write_sbom(uv, tmp_path).read_text("utf-8"))
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.5")
    assert document["metadata"]["component"].items() >= {"name": "imaging-gateway", "version": __version__}.items()
    listed = {item["name"]: item for item in document["components"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["otel"]]
    assert {re.split(r"[<>=\[]", text)[0] for text in required} <= listed.keys()
    assert not listed.keys() & {"pytest", "uv", "numpy"}
    for name, item in listed.items():
        assert item["purl"] == f"pkg:pypi/{name}@{item['version']}"
        assert {entry["alg"] for file in item["externalReferences"] for entry in file["hashes"]} == {"SHA-256"}


@pytest.mark.parametrize(
    ("known", "locked", "code"),
    [
        ("no output: it does not respond", "exit 0", 2),
        ('{"dependencies": [{"name": "jinja2", "vulns": []}]}', "exit 0", 2),
        ('{"dependencies": [{"name": "jinja2", "vulns": [{"id": "CVE-2014-1402"}]}]}', "exit 0", 0),
        ('{"dependencies": [{"name": "jinja2", "vulns": [{"id": "CVE-2014-1402"}]}]}', "exit 1", 1),
    ],
)
def test_audit(tmp_path: Path, known: str, locked: str, code: int) -> None:
    """`make audit` passes only if the service reports a known vulnerability, and none of the locked packages."""
    uv = tmp_path / "uv"
    cases = ("*export*) echo click==8.5.1", f"*vulnerable*) echo '{known}'", f"*) {locked}")
    uv.write_text("#!/bin/sh\ncase $* in " + "".join(f"{case};;\n" for case in cases) + "esac\n")
    uv.chmod(0o700)
    assert CliRunner().invoke(packages.main, ["audit", "--uv", str(uv)]).exit_code == code
