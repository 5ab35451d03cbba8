"""The pages in headless Chromium, driven by Node.js: the playground with every kind and error, and their accessibility.

The tests are `*.test.mjs` beside this file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import httpx2
import pytest

from service.api.guides import GUIDE_NAMES
from tests.pages.node import NODE, check_types, run_node
from tests.process.gateway import GatewayProcess, run_gateway
from tests.process.sandbox import SandboxProcess, call_admin, run_sandbox
from tests.support.valkey import Valkey

HERE = Path(__file__).parent
SAMPLES = {"upscale": "photo.jpg", "vectorize": "logo.png", "face-enhance": "face.jpg", "seamless": "texture.jpg"}
PROGRAMS = {"curl": ["bash", "-euo", "pipefail"], "Python": [sys.executable], "TypeScript": NODE}


@pytest.fixture(scope="module")
def upstream() -> Iterator[SandboxProcess]:
    with run_sandbox() as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def gateway(
    tmp_path_factory: pytest.TempPathFactory, upstream: SandboxProcess, valkey: Valkey
) -> Iterator[GatewayProcess]:
    with run_gateway(tmp_path_factory.mktemp("gateway"), **upstream.gateway_settings(valkey)) as running:
        yield running


def run_tests(name: str, **variables: str) -> None:
    run_node("--test-reporter=spec", HERE / f"{name}.test.mjs", variables=variables)


def new_tenant(gateway: GatewayProcess, name: str, **policy: object) -> str:
    """Create a tenant; returns its token."""
    call_admin(gateway, "PUT", f"/tenants/{name}", json=policy)
    return str(call_admin(gateway, "POST", f"/tenants/{name}/tokens")["token"])


def test_playground(gateway: GatewayProcess, upstream: SandboxProcess, tmp_path: Path) -> None:
    """Every kind and error, by keyboard and pointer; then the programs that were shown run as they are."""
    httpx2.put(f"{upstream.url}/_control/accounts/empty", json={"count": 0, "money": 0}).raise_for_status()
    call_admin(gateway, "PUT", "/accounts/empty", json={"user_key": "empty"})
    variables = {
        "URL": gateway.url,
        "TOKEN": gateway.token,
        "LIMITED_TOKEN": new_tenant(
            gateway, "limited", accounts=["demo"], limits=[{"window": "total", "tasks": 1}], max_active=5
        ),
        "POOR_TOKEN": new_tenant(gateway, "poor", accounts=["empty"]),
        "SANDBOX": upstream.url,
        "FOLDER": str(tmp_path),
    }
    run_tests("playground", **variables)
    for kind, sample in SAMPLES.items():
        for language, command in PROGRAMS.items():
            folder = tmp_path / language / kind
            folder.mkdir(parents=True)
            shutil.copy(str(resources.files("service.demo") / "images" / sample), folder)
            program = folder / ("program.ts" if language == "TypeScript" else "program")
            program.write_bytes((tmp_path / f"{kind}.{language}").read_bytes())
            if language == "TypeScript":
                check_types(program)
            environment = os.environ | {"GATEWAY_TOKEN": gateway.token}
            done = subprocess.run(
                [*command, program.name], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, program.read_text() + done.stdout + done.stderr
            results = [path for path in folder.iterdir() if path.name.startswith(f"{kind}-")]
            assert results
            assert all(path.stat().st_size > 100 for path in results)


def test_accessibility(gateway: GatewayProcess) -> None:
    """No page has a violation that axe finds, or scrolls sideways: narrow and wide, light and dark."""
    pages = ["/docs", "/docs/problems", "/playground", *(f"/docs/{name}" for name in GUIDE_NAMES)]
    run_tests("accessibility", URL=gateway.url, PAGES=" ".join(pages))
    run_tests("accessibility", URL=gateway.ops_url, PAGES="/docs /docs/problems /docs/operating")
