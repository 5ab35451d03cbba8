"""Iteration over an OpenAPI document, and validation by its schemas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

METHODS = {"get", "put", "post", "delete", "patch", "head", "options"}


def iter_operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert method in METHODS
            yield path, method, operation


def iter_webhooks(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for item in document.get("webhooks", {}).values():
        yield from resolve_reference(document, item).values()


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


def assert_matches_schema(document: dict[str, Any], value: Any, schema: dict[str, Any], where: str) -> None:
    """Assert that a value matches a schema; covers the part of JSON Schema that the document uses."""
    schema = resolve_reference(document, schema)
    if "oneOf" in schema:
        fitting = 0
        for option in schema["oneOf"]:
            try:
                assert_matches_schema(document, value, option, where)
            except AssertionError:
                continue
            fitting += 1
        assert fitting == 1, (where, value)
        return
    assert value in schema.get("enum", [value]), (where, value)
    assert value == schema.get("const", value), (where, value)
    types: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    if "type" in schema:
        assert isinstance(value, types[schema["type"]]), (where, value)
    if isinstance(value, dict) and "properties" in schema:
        assert set(schema["required"]) <= value.keys() <= schema["properties"].keys(), (where, value)
        for name, item in value.items():
            assert_matches_schema(document, item, schema["properties"][name], f"{where}.{name}")
    if isinstance(value, list):
        for entry in value:
            assert_matches_schema(document, entry, schema["items"], f"{where}[]")
