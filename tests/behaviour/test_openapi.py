"""The OpenAPI documents: as they are served, against real responses, and for generated clients.

Their files are up to date (`make drift`), so what they say is tested without a gateway.
"""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from httpx2 import Response

from service.api.errors import PROBLEMS
from service.domain.tasks import Kind
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway
from tests.behaviour.openapi_reader import (
    assert_matches_schema,
    iter_objects,
    iter_operations,
    resolve_reference,
)
from tests.support.images import make_png

FOLDER = Path(__file__).parents[2] / "openapi"
ImportModule = Callable[[str], ModuleType]


@cache
def read_document(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.load((FOLDER / f"{name}.yaml").read_bytes(), yaml.CSafeLoader)
    return document


@pytest.fixture(params=["gateway", "operators"])
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read_document(request.param)


async def test_each_port_serves_its_document(gateway: RunningGateway) -> None:
    for url, name in ((gateway.url, "gateway"), (gateway.ops_url, "operators")):
        response = await gateway.http.get(f"{url}/openapi.json")
        assert response.headers["content-type"] == "application/json"
        assert response.json() == read_document(name)


def test_security_and_problems(document: dict[str, Any]) -> None:
    statuses = {problem.code: problem.status for problem in PROBLEMS}
    (scheme,) = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"], document["security"]) == ("http", "bearer", [{"token": []}])
    for path, _, operation in iter_operations(document):
        is_open = path in {"/healthz", "/readyz", "/metrics"} or path.startswith("/api/")
        assert operation.get("security") == ([{}] if is_open else None), path
        assert ("401" in operation["responses"]) == (not is_open), path
        for status, documented in operation["responses"].items():
            content = resolve_reference(document, documented).get("content", {}).get("application/problem+json", {})
            for code, example in content.get("examples", {}).items() if status != "default" else ():
                assert (example["value"]["code"], example["value"]["status"]) == (code, int(status))
                assert statuses[code] == int(status)


def test_examples_match_their_schemas(document: dict[str, Any]) -> None:
    checked = 0
    for _, node in iter_objects(document):
        examples: list[tuple[Any, dict[str, Any]]] = []
        if "schema" in node and "examples" in node:
            examples = [(example["value"], node["schema"]) for example in node["examples"].values()]
        elif "type" in node and isinstance(node.get("examples"), list):
            examples = [(example, node) for example in node["examples"]]
        for example, schema in examples:
            assert_matches_schema(document, example, schema)
        checked += len(examples)
    assert checked > 15


async def test_responses_match_the_document(gateway: RunningGateway) -> None:
    document = read_document("gateway")
    operations = {operation["operationId"]: operation for _, _, operation in iter_operations(document)}

    async def call(operation: str, method: str, path: str, expected: int, **request: Any) -> Response:
        answer = await gateway.call(method, path, **request)
        assert answer.status_code == expected, answer.text
        responses = operations[operation]["responses"]
        response = resolve_reference(document, responses.get(str(expected), responses["default"]))
        (media_type, content) = next(iter(response.get("content", {"": {}}).items()))
        assert answer.headers.get("content-type", "") == media_type
        optional = {"retry-after", "ratelimit", "ratelimit-policy", "idempotent-replayed", "preference-applied"}
        assert {name.lower() for name in response.get("headers", {})} - optional <= {*answer.headers}
        if media_type:
            assert_matches_schema(document, answer.json(), content["schema"])
        return answer

    files = {"image": ("a.png", make_png(), "image/png")}
    await gateway.put_tenant(limits=[{"window": "day", "tasks": 9, "money": 9.5}], max_active=9)
    for kind in Kind:
        body = operations[f"submit-{kind}"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
        examples = {name: str(field["examples"][0]) for name, field in body.items() if field.get("examples")}
        await call(f"submit-{kind}", "POST", f"/v1/tasks/{kind}", 201, files=files, data=examples)
    accepted = await call("submit-upscale", "POST", "/v1/tasks/upscale", 201, files=files, data={"scale": "3"})
    await call("submit-upscale", "POST", "/v1/tasks/upscale", 422, files=files, data={"scale": "9"})
    await call("submit-seamless", "POST", "/v1/tasks/seamless", 415, json={})
    await call("submit-upscale", "POST", "/v1/tasks/upscale", 401, files=files, token="x")
    path = accepted.headers["location"]
    await call("read-task", "GET", path, 200)
    await call("read-task", "GET", path, 304, headers={"If-None-Match": accepted.headers["etag"]})
    await gateway.wait_for_task(accepted.json()["id"])
    await call("read-task", "GET", path, 200)
    await call("read-task", "GET", "/v1/tasks/x", 404)
    await call("list-tasks", "GET", "/v1/tasks?limit=1", 200)
    await call("list-tasks", "GET", "/v1/tasks?limit=0", 422)
    await call("list-tasks", "GET", "/v1/tasks?cursor=x", 400)
    await call("read-quota", "GET", "/v1/quota", 200)
    await call("read-usage", "GET", "/v1/usage", 200)
    await call("read-usage", "GET", "/v1/usage?from=x", 422)
    name = gateway.services.submissions.resolve_submission_id(accepted.json()["id"])
    await call("read-submission", "GET", f"/v1/submissions/{name}", 200)
    await call("read-submission", "GET", "/v1/submissions/x", 404)
    await call("legacy-check", "POST", "/api/check_task_status", 200, data={"user_key": "x", "task_id": "y"})
    old = {"files": {"input_image": files["image"]}, "data": {"user_key": gateway.token}}
    await call("legacy-seamless", "POST", "/api/submit_seamless_task", 200, **old)
    await call("healthz", "GET", "/healthz", 200)
    await call("readyz", "GET", "/readyz", 200)


def generate_client(document: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ImportModule:
    """Generate a client package of a document; return a function that imports its modules."""
    package = f"{document}_client"
    config = folder / "config.yaml"
    config.write_text("post_hooks: []\n")
    command: list[str | Path] = [sys.executable, "-m", "openapi_python_client", "generate", "--path"]
    command += [FOLDER / f"{document}.yaml", "--output-path", folder / package, "--config", config]
    command += ["--meta", "none", "--fail-on-warning"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(folder)
    return lambda module: importlib.import_module(f"{package}.{module}")


@pytest.mark.slow
async def test_generated_tenant_client(
    gateway: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.slow
async def test_generated_operator_client(
    gateway: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = generate_client("operators", tmp_path, monkeypatch)
    models = of("models")
    body = models.TenantBody(accounts=["main"], limits=[models.Limit(window=models.Window.DAY, tasks=5)])
    async with of("client").AuthenticatedClient(base_url=gateway.ops_url, token=ADMIN_TOKEN) as client:
        tenant = await of("api.registry.put_tenant").asyncio("lab", client=client, body=body)
        assert (tenant.name, tenant.limits[0].tasks) == ("lab", 5)
        made = await of("api.registry.create_token").asyncio("lab", client=client)
    assert (await gateway.call("GET", "/v1/quota", token=made.token)).status_code == 200
