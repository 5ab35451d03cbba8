"""The OpenAPI documents."""

from __future__ import annotations

import re
from typing import Any

import pytest

from service.api.errors import PROBLEMS
from service.api.openapi_document import build_document as written
from service.app import operators_app, tenants_app
from service.domain.tasks import OPTIONS, Kind
from tests.behaviour.gateway_fixture import RunningGateway, run_fake_gateway
from tests.behaviour.openapi_reader import (
    assert_matches_schema,
    iter_objects,
    iter_operations,
    iter_webhooks,
    resolve_reference,
)
from tests.support.images import make_png


@pytest.fixture
async def document() -> dict[str, Any]:
    async with run_fake_gateway() as (gateway, _, _):
        response = await gateway.call("GET", "/openapi.json", token="")
        assert response.headers["content-type"] == "application/json"
        content: dict[str, Any] = response.json()
        return content


@pytest.fixture(params=["tenants", "operators"])
async def any_document(request: pytest.FixtureRequest) -> dict[str, Any]:
    async with run_fake_gateway() as (gateway, _, _):
        make = tenants_app if request.param == "tenants" else operators_app
        return written(make(gateway.services))


async def test_document_structure(any_document: dict[str, Any]) -> None:
    assert re.fullmatch(r"3\.1\.\d+", any_document["openapi"])
    assert any_document["info"]["title"]
    assert any_document["info"]["version"]
    used = [operation["tags"] for _, _, operation in iter_operations(any_document)]
    used += [operation["tags"] for operation in iter_webhooks(any_document)]
    assert {name for names in used for name in names} == {tag["name"] for tag in any_document["tags"]}
    assert all(len(names) == 1 for names in used)
    assert all(tag["description"] for tag in any_document["tags"])


async def test_references_resolve(any_document: dict[str, Any]) -> None:
    targets = {node["$ref"] for _, node in iter_objects(any_document) if "$ref" in node}
    for target in targets:
        assert resolve_reference(any_document, {"$ref": target})
    kept = {
        f"#/components/{section}/{name}"
        for section, components in any_document["components"].items()
        for name in components
        if section != "securitySchemes"
    }
    assert kept == targets


async def test_operations_are_described(any_document: dict[str, Any]) -> None:
    operations = list(iter_operations(any_document))
    ids = [operation["operationId"] for _, _, operation in operations]
    assert len(set(ids)) == len(ids)
    for path, _, operation in operations:
        assert operation["summary"], path
        responses = operation["responses"]
        assert resolve_reference(any_document, responses["default"])["content"].keys() == {"application/problem+json"}
        assert any(status.startswith("2") for status in responses), path
        for status, documented in responses.items():
            response = resolve_reference(any_document, documented)
            assert response["description"] not in {"", "Additional response"}
            assert not response["description"].endswith(" follows")
            if status >= "4" and path != "/readyz":
                assert response["content"].keys() == {"application/problem+json"}, (path, status)
        for name in re.findall(r"\{(\w+)\}", path):
            parameter = next(item for item in operation["parameters"] if item["name"] == name)
            assert (parameter["in"], parameter["required"]) == ("path", True)
        for parameter in operation.get("parameters", ()):
            assert parameter.get("description") or path.startswith("/admin/"), (path, parameter)


async def test_no_framework_defaults(any_document: dict[str, Any]) -> None:
    for path, node in iter_objects(any_document):
        assert node.get("headers") != {}, path
        if path[-1:] == ("examples",):
            continue
        if "oneOf" in node:
            types = [item.get("type") for item in node["oneOf"]]
            assert len(types) > 1, path
            assert types != ["integer", "number"], path
        for name, schema in node.get("properties", {}).items():
            assert schema.keys() & {"type", "$ref", "oneOf"} or path[-1] == "Difference", (path, name)
    assert "status_code" not in str(any_document)


async def test_webhooks_are_separate_from_operations(any_document: dict[str, Any]) -> None:
    assert all(item.keys() == {"$ref"} for item in any_document.get("webhooks", {}).values())
    called = {name for _, _, operation in iter_operations(any_document) for name in operation["tags"]}
    assert not called & {name for operation in iter_webhooks(any_document) for name in operation["tags"]}


async def test_file_contents_are_marked(document: dict[str, Any]) -> None:
    images = [
        node["properties"][name]
        for _, node in iter_objects(document)
        for name in ("image", "input_image")
        if isinstance(node.get("properties", {}).get(name), dict)
    ]
    assert len(images) == 2 * len(Kind)
    for image in images:
        marks = image["type"], image["format"], image["contentMediaType"]
        assert marks == ("string", "binary", "application/octet-stream")
    responses = document["paths"]["/v1/tasks/{task_id}/artifacts/{name}"]["get"]["responses"]
    for status in ("200", "206"):
        content = responses[status]["content"]
        assert {"image/png", "application/octet-stream"} <= content.keys()
        assert all(media["schema"] == {"type": "string", "format": "binary"} for media in content.values())


async def test_contents_have_schemas(any_document: dict[str, Any]) -> None:
    for path, node in iter_objects(any_document):
        for media_type, media in node.get("content", {}).items() if isinstance(node.get("content"), dict) else ():
            assert media["schema"], (path, media_type)
            assert {"type": "null"} not in media["schema"].get("oneOf", ()), (path, media_type)
    for _, _, operation in iter_operations(any_document):
        if "requestBody" in operation:
            assert operation["requestBody"]["required"] == (operation["operationId"] != "create-token")


async def test_schemas_are_portable(any_document: dict[str, Any]) -> None:
    patterns = {node["pattern"] for _, node in iter_objects(any_document) if isinstance(node.get("pattern"), str)}
    assert patterns
    for pattern in patterns:
        assert not re.search(r"\\[AZz]|\(\?", pattern)
    assert not {"Error", "Object", "String", "Exception"} & any_document["components"]["schemas"].keys()
    for path, node in iter_objects(any_document):
        # Instead of a choice of all types there is none at all.
        assert len({item.get("type") for item in node.get("oneOf", ())} - {None}) < 6, path


async def test_security_schemes(document: dict[str, Any]) -> None:
    (scheme,) = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert document["security"] == [{"token": []}]
    for path, _, operation in iter_operations(document):
        open_to_all = path in {"/healthz", "/readyz"} or path.startswith("/api/")
        assert operation.get("security") == ([{}] if open_to_all else None), path
        assert ("401" in operation["responses"]) == (not open_to_all), path


async def test_options_match_the_contract(document: dict[str, Any]) -> None:
    expected: dict[str, dict[str, tuple[Any, ...]]] = {
        "upscale": {
            "model": ("string", None, None, "general"),
            "style": ("string", None, None, "general"),
            "scale": ("number", 1, 8, 2),
            "noise": ("number", 1, 1.1, 1.003),
            "steps": ("integer", 20, 40, 30),
            "high_fidelity": ("boolean", None, None, False),
            "strong_inpaint": ("boolean", None, None, False),
            "inpaint_strength": ("number", 0, 1, 0.5),
            "prompt": ("string", None, None, ""),
            "negative_prompt": ("string", None, None, ""),
            "vector": ("boolean", None, None, False),
            "colors": ("integer", 2, 16, 5),
        },
        "vectorize": {"colors": ("integer", 2, 16, 5)},
        "face-enhance": {},
        "seamless": {"fit": ("number", 0.1, 0.9, 0.5)},
    }
    for kind, options in expected.items():
        operation = document["paths"][f"/v1/tasks/{kind}"]["post"]
        schema = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert schema["required"] == ["image"]
        assert schema["additionalProperties"] is False
        properties = dict(schema["properties"])
        assert properties.pop("image")["contentMediaType"] == "application/octet-stream"
        assert properties.pop("metadata")["contentMediaType"] == "application/json"
        assert properties.pop("webhook_url")["format"] == "uri"
        documented = {
            name: (item["type"], item.get("minimum"), item.get("maximum"), item["default"])
            for name, item in properties.items()
        }
        assert documented == options
        assert set(options) == set(OPTIONS[Kind(kind)].__struct_fields__)
        for prompt in {"prompt", "negative_prompt"} & properties.keys():
            assert properties[prompt]["maxLength"] == 2_000


async def test_problems_have_codes_and_examples(document: dict[str, Any]) -> None:
    statuses = {problem.code: problem.status for problem in PROBLEMS}
    for path, _, operation in iter_operations(document):
        for status, documented in operation["responses"].items():
            response = resolve_reference(document, documented)
            content = response.get("content", {}).get("application/problem+json")
            if content is None or status == "default":
                continue
            examples = content["examples"]
            listed = re.findall(r"^- `([^`]+)`: .", response["description"], re.MULTILINE)
            assert list(examples) == listed, (path, status)
            for code, example in examples.items():
                assert example.keys() == {"value"}
                assert (example["value"]["code"], example["value"]["status"]) == (code, int(status))
                assert statuses[code] == int(status)
    codes = {
        code
        for response in document["paths"]["/v1/tasks/upscale"]["post"]["responses"].values()
        for code in re.findall(r"^- `([^`]+)`", resolve_reference(document, response)["description"], re.MULTILINE)
    }
    assert codes >= {"balance-exhausted", "quota-exceeded", "upstream-rejected", "submission-unknown", "overloaded"}
    assert "internal-error" not in codes


async def test_examples_match_their_schemas(any_document: dict[str, Any]) -> None:
    checked = 0
    for _, node in iter_objects(any_document):
        if "schema" in node and "examples" in node:
            for example in node["examples"].values():
                assert_matches_schema(any_document, example["value"], node["schema"])
                checked += 1
        elif "type" in node and isinstance(node.get("examples"), list):
            for example in node["examples"]:
                assert_matches_schema(any_document, example, node)
                checked += 1
    assert checked > 15


@pytest.mark.parametrize("kind", Kind)
async def test_example_submission_is_accepted(gateway: RunningGateway, document: dict[str, Any], kind: Kind) -> None:
    operation = document["paths"][f"/v1/tasks/{kind}"]["post"]
    fields = operation["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    examples = {name: str(field["examples"][0]) for name, field in fields.items() if field.get("examples")}
    assert (await gateway.submit(kind, examples)).status_code == 201


async def test_responses_match_the_document(gateway: RunningGateway, document: dict[str, Any]) -> None:
    async def call_documented(operation: str, method: str, path: str, expected: int, **request: Any) -> Any:
        answer = await gateway.call(method, path, **request)
        assert answer.status_code == expected
        (documented,) = [item for _, _, item in iter_operations(document) if item["operationId"] == operation]
        response = resolve_reference(
            document, documented["responses"].get(str(expected), documented["responses"]["default"])
        )
        (media_type, content) = next(iter(response.get("content", {"": {}}).items()))
        assert answer.headers.get("content-type", "") == media_type
        optional = {"retry-after", "ratelimit", "ratelimit-policy", "idempotent-replayed", "preference-applied"}
        assert {name.lower() for name in response.get("headers", {})} - optional <= {*answer.headers}
        if media_type:
            assert_matches_schema(document, answer.json(), content["schema"])
        return answer

    files = {"image": ("a.png", make_png(), "image/png")}
    await gateway.put_tenant(limits=[{"window": "day", "tasks": 5, "money": 9.5}], max_active=3)
    accepted = await call_documented(
        "submit-upscale", "POST", "/v1/tasks/upscale", 201, files=files, data={"scale": "3"}
    )
    await call_documented("submit-upscale", "POST", "/v1/tasks/upscale", 422, files=files, data={"scale": "9"})
    await call_documented("submit-seamless", "POST", "/v1/tasks/seamless", 415, json={})
    await call_documented("submit-upscale", "POST", "/v1/tasks/upscale", 401, files=files, token="x")
    path = accepted.headers["location"]
    await call_documented("read-task", "GET", path, 200)
    tag = accepted.headers["etag"]
    await call_documented("read-task", "GET", path, 304, headers={"If-None-Match": tag})
    await gateway.wait_for_task(accepted.json()["id"])
    await call_documented("read-task", "GET", path, 200)
    await call_documented("read-task", "GET", "/v1/tasks/x", 404)
    await call_documented("list-tasks", "GET", "/v1/tasks?limit=1", 200)
    await call_documented("list-tasks", "GET", "/v1/tasks?limit=0", 422)
    await call_documented("list-tasks", "GET", "/v1/tasks?cursor=x", 400)
    await call_documented("read-quota", "GET", "/v1/quota", 200)
    await call_documented("read-usage", "GET", "/v1/usage", 200)
    await call_documented("read-usage", "GET", "/v1/usage?from=x", 422)
    name = gateway.services.submissions.resolve_submission_id(accepted.json()["id"])
    await call_documented("read-submission", "GET", f"/v1/submissions/{name}", 200)
    await call_documented("read-submission", "GET", "/v1/submissions/x", 404)
    await call_documented("legacy-check", "POST", "/api/check_task_status", 200, data={"user_key": "x", "task_id": "y"})
    old = {"input_image": ("a.png", make_png(), "image/png")}
    await call_documented(
        "legacy-seamless", "POST", "/api/submit_seamless_task", 200, files=old, data={"user_key": gateway.token}
    )
    await call_documented("healthz", "GET", "/healthz", 200)
    await call_documented("readyz", "GET", "/readyz", 200)


async def test_closed_bodies_are_documented() -> None:
    async with run_fake_gateway() as (gateway, _, _):
        document = written(operators_app(gateway.services))
    bodies = [
        resolve_reference(document, media["schema"])
        for _, _, operation in iter_operations(document)
        for media in operation.get("requestBody", {}).get("content", {}).values()
    ]
    assert sum(body.get("additionalProperties") is False for body in bodies) >= 2
