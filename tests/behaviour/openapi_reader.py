"""Iteration over an OpenAPI document, and validation by its schemas."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from jsonschema import Draft202012Validator

METHODS = {"get", "put", "post", "delete", "patch", "head", "options"}


def iter_operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert method in METHODS
            yield path, method, operation


def iter_objects(node: Any, *path: str) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Iterate over all objects of a document with their paths."""
    if isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            yield from iter_objects(value, *path, key)
    elif isinstance(node, list):
        for item in node:
            yield from iter_objects(item, *path)


def resolve_reference(document: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        assert node["$ref"].startswith("#/")
        target: Any = document
        for step in node["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        node = target
    return node


def assert_matches_schema(document: dict[str, Any], value: Any, schema: dict[str, Any]) -> None:
    """Assert that a value matches a schema of a document, without properties that the document lacks."""
    root = deepcopy({"schema": schema, "components": document["components"]})
    for _, node in iter_objects(root):
        if isinstance(node.get("properties"), dict):
            node.setdefault("additionalProperties", False)
    schema = root["schema"] | {"components": root["components"]}  # to which its references point
    Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(value)
