"""Clients generated from the OpenAPI documents."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway, run_real_gateway
from tests.support.images import make_png
from tests.support.valkey import Valkey

DOCUMENTS = Path(__file__).parents[2] / "openapi"
ImportModule = Callable[[str], ModuleType]


@pytest.fixture
async def gateway(valkey: Valkey) -> AsyncIterator[RunningGateway]:
    async with run_real_gateway(valkey) as running_gateway:
        yield running_gateway


def generate_client(document: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ImportModule:
    """Generate a client package of a document; return a function that imports its modules."""
    package = f"{document}_client"
    config = folder / "config.yaml"
    config.write_text("post_hooks: []\n")
    command: list[str | Path] = [sys.executable, "-m", "openapi_python_client", "generate", "--path"]
    command += [DOCUMENTS / f"{document}.yaml", "--output-path", folder / package, "--config", config]
    command += ["--meta", "none", "--fail-on-warning"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(folder)
    return lambda module: importlib.import_module(f"{package}.{module}")


async def test_tenant_client(gateway: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = generate_client("gateway", tmp_path, monkeypatch)
    models = of("models")

    def body(scale: float) -> object:
        image = of("types").File(io.BytesIO(make_png(64, 64)), "a.png", "image/png")
        return models.SubmitUpscaleBody(image=image, scale=scale, metadata='{"order": "4711"}')

    async with of("client").AuthenticatedClient(base_url=gateway.url, token=gateway.token) as client:
        submit = of("api.tasks.submit_upscale").asyncio
        task = await submit(client=client, body=body(3), idempotency_key='"4711"')
        assert (task.kind, task.state, task.options["scale"]) == (models.Kind.UPSCALE, models.State.QUEUED, 3)
        await gateway.wait_for_task(task.id)
        task = await of("api.tasks.read_task").asyncio(task.id, client=client)
        assert task.state is models.State.SUCCEEDED
        (artifact,) = task.artifacts
        name = models.ReadArtifactName(artifact.name)
        result = await of("api.tasks.read_artifact").asyncio(task.id, name, client=client)
        assert result.payload.read() == (await gateway.call("GET", artifact.href)).content
        assert [error.field for error in (await submit(client=client, body=body(9))).errors] == ["scale"]


async def test_operator_client(gateway: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = generate_client("operators", tmp_path, monkeypatch)
    models = of("models")
    body = models.TenantBody(accounts=["main"], limits=[models.Limit(window=models.Window.DAY, tasks=5)])
    async with of("client").AuthenticatedClient(base_url=gateway.ops_url, token=ADMIN_TOKEN) as client:
        tenant = await of("api.registry.put_tenant").asyncio("lab", client=client, body=body)
        assert (tenant.name, tenant.limits[0].tasks) == ("lab", 5)
        made = await of("api.registry.create_token").asyncio("lab", client=client)
    assert (await gateway.call("GET", "/v1/quota", token=made.token)).status_code == 200
