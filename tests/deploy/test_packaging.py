"""The image and the version, checked without a build; `make image-check` and `make release-check` build both."""

from __future__ import annotations

import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import click
import pytest
from click.testing import CliRunner

from deploy import healthcheck
from deploy.grafana.__main__ import main as write_dashboards
from deploy.helm.__main__ import main as write_chart
from deploy.reference import main as write_reference
from service import __version__

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_build() -> None:
    """Uv has one version, the base image is an argument, and a change of the code keeps the layer of the packages."""
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"^ARG UV_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE) == re.findall(
        r"^UV_VERSION := (\S+)$", makefile, re.MULTILINE
    )
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == ["${PYTHON_IMAGE}"] * 2
    steps = [DOCKERFILE.index(step) for step in ("COPY pyproject.toml uv.lock", "--no-install-project", "COPY service")]
    assert steps == sorted(steps)


def test_build_context() -> None:
    """The build context contains exactly what the Dockerfile copies."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    copied = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for words in copied for source in words.split() if source != "/app"}
    assert {line.strip("!/") for line in lines if line.startswith("!")} == sources


def test_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails unless the operators' port responds with 200, also if nothing listens there."""

    class Operators(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.pop() if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Suppress the request log."""

    statuses = [500, 200]
    with ThreadingHTTPServer(("127.0.0.1", 0), Operators) as server:
        monkeypatch.setenv("GATEWAY_OPS_PORT", str(server.server_port))
        serving = Thread(target=server.serve_forever)
        serving.start()
        try:
            assert [healthcheck.main(), healthcheck.main()] == [0, 1]
        finally:
            server.shutdown()
            serving.join()
    assert healthcheck.main() == 1


def test_version() -> None:
    """The version is the newest of the changelog, whose versions descend."""
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
    ids=["dashboards", "chart", "settings"],
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
