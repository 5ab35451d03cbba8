"""Tasks in the OpenAPI documents: a schema for each kind, so that a generated client knows the options of a task."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
from msgspec.structs import replace

from service.api.openapi import option_schemas
from service.api.schemas import OperatorTask, Task
from service.domain.tasks import OPTIONS, Kind

Node = dict[str, Any]
_INPUT_WORDS = frozenset({"default", "minimum", "maximum", "maxLength"})


def describe_tasks(document: Node, example: Task) -> None:
    """Replace the schema of a task by a choice of one for each kind; a submission returns that of its kind."""
    schemas = document["components"]["schemas"]
    for name in (Task.__name__, OperatorTask.__name__):
        if name in schemas:
            _divide_schema(schemas, name)
    for kind, options in OPTIONS.items():
        if variant := schemas.get(_variant_name(Task.__name__, kind)):
            other = replace(example, kind=kind, options=msgspec.to_builtins(options()))
            variant["examples"] = [example if kind is example.kind else other]
            created = document["paths"][f"/v1/tasks/{kind}"]["post"]["responses"]["201"]
            created["content"]["application/json"]["schema"] = _refer_schema(_variant_name(Task.__name__, kind))


def _divide_schema(schemas: Node, name: str) -> None:
    base = schemas[name]
    for kind, options in OPTIONS.items():
        schemas[options.__name__] = _describe_options(kind)
        own = {"kind": {"type": "string", "const": str(kind)}, "options": _refer_schema(options.__name__)}
        variant = _variant_name(name, kind)
        schemas[variant] = base | {"title": variant, "properties": base["properties"] | own}
    references = {str(kind): _refer_schema(_variant_name(name, kind)) for kind in OPTIONS}
    schemas[name] = {
        "description": base["description"],
        "oneOf": list(references.values()),
        "discriminator": {
            "propertyName": "kind",
            "mapping": {kind: reference["$ref"] for kind, reference in references.items()},
        },
    }


def _variant_name(name: str, kind: Kind) -> str:
    """Return the name of the schema for a kind, such as `OperatorUpscaleTask`."""
    return name.removesuffix("Task") + OPTIONS[kind].__name__.removesuffix("Options") + "Task"


def _describe_options(kind: Kind) -> Node:
    """Describe the options that a task has.

    Without ranges, which a client that was generated before a change would enforce. None is required, since a task that
    the store has lost has none; and none has a default, which a client would show in its place.
    """
    properties = {
        name: {word: value for word, value in schema.items() if word not in _INPUT_WORDS}
        for name, schema in option_schemas(kind).items()
    }
    return {"type": "object", "description": inspect.getdoc(OPTIONS[kind]), "properties": properties}


def _refer_schema(name: str) -> Node:
    return {"$ref": f"#/components/schemas/{name}"}
