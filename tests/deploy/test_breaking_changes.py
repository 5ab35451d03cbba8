"""Breaking changes of the OpenAPI documents."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.breaking_changes import find_breaking_changes

FILE = Path(__file__).parents[2] / "openapi" / "gateway.yaml"
UPSCALE, LIST, TASK = "/v1/tasks/upscale", "/v1/tasks", "/v1/tasks/{task_id}"
Edit = Callable[[Any, Any], Any]


@pytest.fixture(scope="module")
def document() -> Any:
    return yaml.load(FILE.read_bytes(), yaml.CSafeLoader)


def form(paths: Any) -> Any:
    return paths[UPSCALE]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]


BREAKING: list[tuple[Edit, str]] = [
    (lambda paths, _: paths.pop(TASK), f"GET {TASK}: is removed"),
    (lambda paths, _: paths[TASK]["get"].update(operationId="get-task"), "operation read-task is renamed"),
    (lambda paths, _: paths[LIST]["get"]["parameters"].pop(1), "query kind is removed"),
    (lambda paths, _: paths[LIST]["get"]["parameters"][0].update(required=True), "query state is required"),
    (lambda paths, _: paths[TASK]["get"]["responses"].pop("200"), "200 is removed"),
    (lambda paths, _: paths[TASK]["get"]["responses"]["200"]["headers"].pop("ETag"), "header ETag is removed"),
    (lambda paths, _: form(paths).update(required=["scale"]), "body.scale is required"),
    (lambda paths, _: form(paths)["properties"].pop("noise"), "body.noise is removed"),
    (lambda paths, _: form(paths)["properties"]["scale"].update(maximum=4), "body.scale: maximum is 4, was 8"),
    (lambda paths, _: form(paths)["properties"]["scale"].update(type="integer"), "body.scale: number is refused"),
    (lambda paths, _: form(paths)["properties"]["scale"].update(default=3), "body.scale: default is 3, was 2.0"),
    (lambda _, schemas: schemas["State"]["enum"].append("lost"), "200.state: lost is new"),
    (lambda _, schemas: schemas["State"]["enum"].remove("queued"), "query state: queued is refused"),
    (lambda _, schemas: schemas["Task"]["oneOf"].append({"type": "null"}), "200: null is new"),
    (lambda _, schemas: schemas["UpscaleTask"]["required"].remove("cost"), "201.cost is optional"),
    (lambda _, schemas: schemas["UpscaleOptions"]["properties"].pop("steps"), "201.options.steps is removed"),
    (lambda _, schemas: schemas["TaskList"]["properties"]["items"].update(type="object"), "200.items: object is new"),
]
COMPATIBLE: list[Edit] = [
    lambda paths, _: paths.update({"/v2": {"get": {}}}),
    lambda paths, _: form(paths)["properties"].update(size={"type": "integer"}),
    lambda paths, _: form(paths)["properties"]["scale"].update(maximum=16),
    lambda paths, _: paths[TASK]["get"]["responses"].pop("404"),
    lambda _, schemas: schemas["UpscaleTask"]["properties"].update(size={"type": "integer"}),
    lambda _, schemas: schemas["UpscaleOptions"].update(required=["scale"]),
    lambda _, schemas: schemas["Task"]["oneOf"].pop(),
]


@pytest.mark.parametrize(("edit", "change"), BREAKING, ids=[change for _, change in BREAKING])
def test_breaking(document: Any, edit: Edit, change: str) -> None:
    changed = copy.deepcopy(document)
    edit(changed["paths"], changed["components"]["schemas"])
    assert any(found.endswith(change) for found in find_breaking_changes(document, changed))


def test_compatible(document: Any) -> None:
    for edit in COMPATIBLE:
        changed = copy.deepcopy(document)
        edit(changed["paths"], changed["components"]["schemas"])
        assert not find_breaking_changes(document, changed)


def test_other_fields_that_are_newly_refused(document: Any) -> None:
    old, new = copy.deepcopy(document), copy.deepcopy(document)
    form(old["paths"]).pop("additionalProperties", None)
    form(new["paths"])["additionalProperties"] = False
    assert "body: other fields are refused" in "".join(find_breaking_changes(old, new))
