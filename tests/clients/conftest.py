"""A gateway as a process, and the programs that call it: each submits, waits, fetches the result and gets a problem."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from service.domain.tasks import Kind
from tests.process.gateway import TIMEOUT_SECONDS, GatewayProcess, run_gateway
from tests.process.sandbox import run_sandbox
from tests.support.images import make_png
from tests.support.valkey import run_valkey

PROGRAMS = Path(__file__).parent / "programs"
RunProgram = Callable[..., None]
JAVA_OPTIONS = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""Halves the time of programs that end soon."""


def run(
    *command: str | Path, cwd: Path | None = None, environ: dict[str, str] | None = None, content: bytes = b""
) -> str:
    """Run a command to its end, with `content` in its standard input; return its output."""
    env = os.environ | {"JAVA_TOOL_OPTIONS": JAVA_OPTIONS} | (environ or {})
    done = subprocess.run(
        command, cwd=cwd, env=env, input=content, capture_output=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace")
    return done.stdout.decode()


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with run_valkey() as store, run_sandbox() as sandbox:  # a store of its own, since it runs until the session ends
        settings = sandbox.gateway_settings(store)
        with run_gateway(tmp_path_factory.mktemp("gateway"), **settings) as running:
            for kind in Kind:
                running.call("POST", f"/v1/tasks/{kind}", files={"image": make_png()}).raise_for_status()
            yield running


@pytest.fixture
def run_program(gateway: GatewayProcess, tmp_path: Path) -> RunProgram:
    """Run a program with the paths of an image and of its result; check the result and what it prints.

    `more` is what it prints beside what all of them do.
    """

    def run_and_check(*command: str | Path, python_path: str = "", **more: object) -> None:
        image, result = tmp_path / "image.png", tmp_path / "result.png"
        image.write_bytes(make_png(24, 16))
        environ = {"GATEWAY_URL": gateway.url, "GATEWAY_TOKEN": gateway.token, "PYTHONPATH": python_path}
        printed = json.loads(run(*command, image, result, environ=environ))
        assert printed == {"scale": 3, "order": "4711", "code": "invalid-options", "fields": ["metadata"]} | more
        with Image.open(result) as enlarged:
            assert enlarged.size == (3 * 24, 3 * 16)

    return run_and_check
