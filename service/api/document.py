"""The OpenAPI document of an application: what Litestar writes of the code, with what the code can't say."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from decimal import Decimal
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Litestar
from msgspec import Struct

from service.api import (
    admin_views,
    legacy,
    openapi,
    ops,
    registry_views,
    submission_views,
    usage_views,
    views,
    webhook_views,
)
from service.api.examples import ACCEPTED, EXAMPLES, STREAMS, TABLES, problem
from service.api.problems import MEDIA_TYPE
from service.api.views import TaskView
from service.api.webhook_document import add_webhooks

Node = dict[str, Any]

_TEXT, _SECONDS = {"type": "string"}, {"type": "integer", "minimum": 0}
_FILE = _TEXT | {"format": "binary"}
_HEADER_COMPONENTS: Mapping[str, Node] = {
    "X-Request-Id": {
        "description": "The id of the request: yours, if you sent one of this form, else a new one.",
        "schema": _TEXT | {"pattern": "^[A-Za-z0-9._-]{1,128}$"},
    },
    "Location": {"description": "Where the task is read.", "schema": _TEXT | {"format": "uri-reference"}},
    "Content-Disposition": {"description": "A name for the file.", "schema": _TEXT},
    "Content-Range": {"description": "Which bytes these are, and of how many.", "schema": _TEXT},
    "ETag": {"description": "The version of what is answered, for If-None-Match or If-Match.", "schema": _TEXT},
    "Last-Modified": {"description": "When the result was made, for If-Modified-Since.", "schema": _TEXT},
    "Accept-Ranges": {"description": "`bytes` if a part can be asked for.", "schema": _TEXT},
    "Age": {"description": "How many seconds ago the upstream last told of the task.", "schema": _SECONDS},
    "Retry-After": {
        "description": "After how many seconds to ask again. Absent where waiting does not help, and once a task has "
        "ended.",
        "schema": _SECONDS,
    },
    "Cache-Control": {"description": "Only you may keep it, if anybody.", "schema": _TEXT},
    "RateLimit-Policy": {
        "description": "Your limits on tasks, each with its quota `q` and its window `w` in seconds. Absent without "
        "limits.",
        "schema": _TEXT | {"examples": ['"day-tasks";q=100;w=86400, "total-tasks";q=5000']},
    },
    "RateLimit": {
        "description": "What each limit on tasks leaves (`r`), and in how many seconds it resets (`t`). Absent without "
        "limits.",
        "schema": _TEXT | {"examples": ['"day-tasks";r=41;t=22980, "total-tasks";r=812']},
    },
    "Preference-Applied": {"description": "How long was waited for at the most.", "schema": _TEXT},
    "Idempotent-Replayed": {
        "description": "`true` if the answer is about what was submitted first under the same `Idempotency-Key`.",
        "schema": _TEXT | {"const": "true"},
    },
    "WWW-Authenticate": {"description": "How to authenticate: with a bearer token.", "schema": _TEXT},
}
_NAMES = {name.lower(): name for name in _HEADER_COMPONENTS}
_ON_PROBLEMS: Mapping[str, tuple[str, ...]] = {
    "401": ("WWW-Authenticate",),
    "402": ("Retry-After",),
    "409": ("Retry-After",),
    "416": ("Content-Range",),
    "429": ("Retry-After", "RateLimit-Policy", "RateLimit"),
    "503": ("Retry-After",),
    "504": ("Idempotent-Replayed",),
}
_ON_NOT_MODIFIED = frozenset({"ETag", "Age", "Retry-After", "Last-Modified", "Accept-Ranges", "Cache-Control"})
"""What of a success's headers is told even if its content is not."""
_MODULES = (
    admin_views,
    legacy,
    openapi,
    ops,
    registry_views,
    submission_views,
    usage_views,
    views,
    webhook_views,
)
_OBJECTS: Mapping[str, type[Struct]] = {
    name: found
    for module in _MODULES
    for name, found in vars(module).items()
    if isinstance(found, type) and issubclass(found, Struct) and found.__module__ == module.__name__
}
"""The objects that are sent. Litestar tells neither what the code says of them, nor that they are all there is."""
_FILES = frozenset({"read-artifact"})
"""The operations whose answers are files."""
_UNSAID = ("deprecated", "allowEmptyValue", "allowReserved")
_TYPES = frozenset({"object", "array", "string", "boolean", "number", "null"})
_ORDER = ("openapi", "info", "servers", "security", "tags", "paths", "webhooks", "components")


def document(app: Litestar) -> Node:
    """The document of an application's routes, ready to be served."""
    written = _tidy(app.openapi_schema.to_schema())
    components = written["components"]
    schemas = components["schemas"]
    for name, schema in schemas.items():
        schema.pop("title", None)
        if found := _OBJECTS.get(name):
            schema["description"] = inspect.getdoc(found)
            if found.__struct_config__.forbid_unknown_fields:
                schema["additionalProperties"] = False
        if name in EXAMPLES:
            schema["examples"] = [_json(EXAMPLES[name])]
    components["responses"] = {"Problem": _any_problem()}
    used = {"X-Request-Id"}
    for operation in _operations(written):
        operation["responses"] = dict(_responses(operation["responses"]))
        used = used.union(*(response.get("headers", ()) for response in operation["responses"].values()))
        _show(operation["operationId"], operation["responses"])
        for parameter in operation.get("parameters", ()):
            _clarify(parameter)
        _clarify_body(operation.get("requestBody", {}))
    if TaskView.__name__ in schemas:
        add_webhooks(written)
    components["headers"] = {name: header for name, header in _HEADER_COMPONENTS.items() if name in used}
    names = {name: name.removesuffix("View") for name in schemas}
    renamed = _renamed(written, names)
    components = renamed["components"]
    components["schemas"] = dict(sorted((names[name], schema) for name, schema in components["schemas"].items()))
    return {key: renamed[key] for key in _ORDER if key in renamed}


def _show(operation: str, responses: Node) -> None:
    """Show what the code can't say of the contents of an operation's successes."""
    if accepted := ACCEPTED.get(operation):
        responses["201"]["content"]["application/json"]["examples"] = {"accepted": {"value": _json(accepted)}}
    if table := TABLES.get(operation):
        responses["200"]["content"]["text/csv"] = {"schema": _TEXT, "examples": {"usage": {"value": table}}}
    if stream := STREAMS.get(operation):
        for media in responses["200"]["content"].values():
            media["examples"] = {"end": {"value": stream}}
    if operation in _FILES:
        for status in ("200", "206"):
            responses[status]["content"] = {media_type: {"schema": _FILE} for media_type in openapi.FILE_TYPES}


def _operations(written: Node) -> Iterator[Node]:
    for item in written["paths"].values():
        yield from item.values()


def _responses(responses: Node) -> Iterator[tuple[str, Node]]:
    """The responses by status, without those that Litestar assumes, with the headers each comes with."""
    of_success = [_NAMES[each.lower()] for each in responses.get("200", {}).get("headers", ())]
    for status, response in sorted(responses.items()):
        if _is_assumed(response):
            continue
        names = [_NAMES[each.lower()] for each in response.get("headers", ())]
        if status == "206":
            names += [*of_success, "Content-Range"]
        if status == "304":
            names += _ON_NOT_MODIFIED.intersection(of_success)
        # A problem names the request in itself.
        is_problem = MEDIA_TYPE in response.get("content", {})
        names += _ON_PROBLEMS.get(status, ()) if is_problem else ("X-Request-Id",)
        if response["description"] == _assumed_description(status):
            response["description"] = HTTPStatus(int(status)).phrase
        for media in response.get("content", {}).values():
            media["schema"] = _present(media["schema"])
            if is_problem:
                # Litestar's own examples lack what is null in them.
                media["examples"] = {code: {"value": problem(code)} for code in media["examples"]}
        yield status, response | ({"headers": _references(names)} if names else {})
    yield "default", {"$ref": "#/components/responses/Problem"}


def _json(example: Struct) -> Any:
    return msgspec.json.decode(msgspec.json.encode(example))


def _is_assumed(response: Node) -> bool:
    """Whether it is the error that Litestar would answer to a faulty parameter, were it not for our own handlers."""
    media = response.get("content", {}).get("application/json", {})
    return "status_code" in media.get("schema", {}).get("properties", {})


def _assumed_description(status: str) -> str:
    """What Litestar says of an answer of which the code says nothing."""
    return HTTPStatus(int(status)).description


def _any_problem() -> Node:
    schema = {"$ref": "#/components/schemas/ProblemView"}
    return {
        "description": "Any other problem: an unknown address (404) or method (405), or a fault of the gateway (500).",
        "headers": _references(["X-Request-Id"]),
        "content": {MEDIA_TYPE: {"schema": schema}},
    }


def _references(names: list[str]) -> Node:
    # In an order of their own, since Litestar has them in none.
    return {name: {"$ref": f"#/components/headers/{name}"} for name in _HEADER_COMPONENTS if name in names}


def _clarify(parameter: Node) -> None:
    """Say things once."""
    parameter["schema"].pop("description", None)
    parameter["schema"] = _present(parameter["schema"])


def _clarify_body(body: Node) -> None:
    """Tell a body that may be left out from one that may be null."""
    for media in body.get("content", {}).values():
        present = _present(media["schema"])
        body["required"] = present == media["schema"]
        media["schema"] = present


def _present(schema: Node) -> Node:
    """What a value is where there is one at all: parameters and contents are never null."""
    options: list[Node] = [each for each in schema.get("oneOf", ()) if each != {"type": "null"}]
    if len(options) != 1:
        return schema
    return options[0] | {key: value for key, value in schema.items() if key != "oneOf"}


def _tidy(node: Any) -> Any:
    """A part of the document without what says nothing, in JSON's own types."""
    match node:
        case dict():
            kept = {
                key: _tidy(value)
                for key, value in node.items()
                if not (key in _UNSAID and value is False) and not (key == "headers" and value == {})
            }
            return _schema(kept)
        case list():
            return [_tidy(each) for each in node]
        case Decimal() | float() if node == int(node):
            return int(node)
        case Decimal():
            return float(node)
        case _:
            return node


def _schema(node: Node) -> Node:
    """A schema said more simply; anything else as it is."""
    if {"type": "number"} in node.get("oneOf", ()):
        # A whole number would be both, which `oneOf` does not allow.
        node = node | {"oneOf": [each for each in node["oneOf"] if each != {"type": "integer"}]}
    if {each.get("type") for each in node.get("oneOf", ())} >= _TYPES:
        # Client generators write invalid code for a choice of all types.
        node = {key: value for key, value in node.items() if key != "oneOf"}
    for choice in ("oneOf", "allOf"):
        if len(node.get(choice, ())) == 1:
            node = node[choice][0] | {key: value for key, value in node.items() if key != choice}
    if isinstance(pattern := node.get("pattern"), str):
        # Python's anchors are unknown to ECMA-262, whose `$` is the end of the text and nothing else.
        node = node | {"pattern": pattern.replace(r"\A", "^").replace(r"\Z", "$")}
    properties = node.get("properties")
    if isinstance(properties, dict) and isinstance(node.get("required"), list):
        node["required"] = [name for name in properties if name in node["required"]]
    return node


def _renamed(node: Any, names: Mapping[str, str]) -> Any:
    """A part of the document with its references to schemas under other names."""
    if isinstance(node, list):
        return [_renamed(each, names) for each in node]
    if not isinstance(node, dict):
        return node
    head, _, name = str(node.get("$ref", "")).rpartition("/")
    if head == "#/components/schemas":
        return node | {"$ref": f"{head}/{names[name]}"}
    return {key: _renamed(value, names) for key, value in node.items()}
