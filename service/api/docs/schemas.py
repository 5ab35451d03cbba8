"""What the JSON schemas of an OpenAPI document say: in words, field by field, and as samples."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from service.api.docs.markup import Html, join, tag

Node = Mapping[str, Any]

_FORMATS = {"date-time": "2026-01-31T12:00:00Z", "date": "2026-01-31", "uri": "https://example.com/"}
_WORDS = {
    "array": "list",
    "boolean": "true or false",
    "null": "null",
    "number": "number",
    "integer": "integer",
    "object": "object",
    "string": "string",
}
_LIMITS = (
    ("at least {}", "minimum"),
    ("above {}", "exclusiveMinimum"),
    ("at most {}", "maximum"),
    ("below {}", "exclusiveMaximum"),
    ("at least {} characters", "minLength"),
    ("at most {} characters", "maxLength"),
    ("at least {} items", "minItems"),
    ("at most {} items", "maxItems"),
    ("like {}", "pattern"),
)


class Field(Struct, frozen=True):
    """One property of an object, or one field of a form."""

    name: str
    node: Node
    required: bool


class Schemas:
    """Reads the schemas of one document, and its references.

    `linked` collects the objects that words point to: the page must show them. `security` is what an operation asks
    for that does not say otherwise.
    """

    def __init__(self, document: Node) -> None:
        self._document = document
        self.security: Sequence[Node] = document.get("security", ())
        self.linked: dict[str, Node] = {}

    def resolve(self, node: Node) -> Node:
        """Follow a reference, and take the parts of an `allOf` for one."""
        while "$ref" in node:
            target: Any = self._document
            for step in node["$ref"].removeprefix("#/").split("/"):
                target = target[step.replace("~1", "/").replace("~0", "~")]
            node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
        whole = {key: value for key, value in node.items() if key != "allOf"}
        for part in map(self.resolve, node.get("allOf", ())):
            whole = {**part, **whole, "properties": {**part.get("properties", {}), **whole.get("properties", {})}}
        return whole

    def fields(self, node: Node) -> list[Field]:
        """The properties of an object, in the document's order."""
        schema = self.resolve(node)
        required = schema.get("required", ())
        return [Field(name, field, name in required) for name, field in schema.get("properties", {}).items()]

    def present(self, node: Node) -> Node:
        """What a value may be where it is given at all: parameters and forms know no null."""
        options = [option for option in _options(node) if option.get("type") != "null"]
        if len(options) != 1:
            return node
        return {**options[0], **{key: value for key, value in node.items() if key not in {"oneOf", "anyOf"}}}

    def choices(self, node: Node) -> list[Any]:
        """The values a schema lists, if it lists any."""
        schema = self.resolve(node)
        return [schema["const"]] if "const" in schema else list(schema.get("enum", ()))

    def words(self, node: Node) -> Html:
        """What a value may be: its type, range and default, with links to objects that are described elsewhere."""
        schema = self.resolve(node)
        name = node.get("$ref", "").rpartition("/")[2]
        if name and schema.get("properties"):
            self.linked[name] = schema
            return tag("a", name, href=f"#{anchor('schema', name)}")
        parts = [self._kind(schema), *_limits(schema)]
        if examples := [value for value in schema.get("examples", ()) if value != schema.get("default")]:
            parts.append(join(["such as ", _listed(examples)]))
        if schema.get("default") is not None:
            parts.append(
                join(["default ", _listed([schema["default"]])]) if schema["default"] != "" else "default empty"
            )
        return join(parts, ", ")

    def sample(self, node: Node, within: frozenset[str] = frozenset()) -> Any:
        """A value the schema allows, for reading rather than for use: the document's own example where it has one."""
        schema = self.resolve(node)
        given = [*schema.get("examples", ()), *self.choices(schema)]
        given += [schema["default"]] if schema.get("default") is not None else []
        if given:
            return given[0]
        reference = node.get("$ref", "")
        if reference in within or "null" in [*_types(schema), *(option.get("type") for option in _options(schema))]:
            return None
        within |= {reference} - {""}
        if _options(schema):
            return self.sample(_options(schema)[0], within)
        type_ = next(iter(_types(schema)), "string")
        if type_ == "object":
            return {field.name: self.sample(field.node, within) for field in self.fields(schema)}
        if type_ == "array":
            return [self.sample(schema.get("items", {}), within)]
        number, text = schema.get("minimum", 1), _FORMATS.get(schema.get("format", ""), "…")
        return {"boolean": True, "integer": number, "number": number}.get(type_, text)

    def media_sample(self, media: Node) -> Any:
        """What a body or an answer of a media type looks like."""
        for example in media.get("examples", {}).values():
            return self.resolve(example)["value"]
        return self.sample(media.get("schema", {}))

    def _kind(self, schema: Node) -> Html:
        if _options(schema):
            return join(map(self.words, _options(schema)), " or ")
        if choices := self.choices(schema):
            return join(["one of ", _listed(choices)])
        if is_file(schema):
            return Html("file")
        return join((self._type(type_, schema) for type_ in _types(schema)), " or ") or Html("any value")

    def _type(self, type_: str, schema: Node) -> Html:
        words = [_WORDS.get(type_, type_)]
        items = {"array": "items", "object": "additionalProperties"}.get(type_)
        if items and isinstance(schema.get(items), Mapping) and schema[items]:
            return join([*words, " of ", self.words(schema[items])])
        shape = schema.get("format", schema.get("contentMediaType", "password"))
        if type_ == "string" and shape != "password":
            return join([*words, ", ", shape])
        return join(words)


def is_file(schema: Node) -> bool:
    """Whether a form field holds bytes rather than text."""
    media_type = schema.get("contentMediaType", "text/plain")
    return schema.get("format") == "binary" or not (media_type.startswith("text/") or media_type.endswith("json"))


def anchor(*words: str) -> str:
    """The place of something on the page, fit for an address."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def _options(schema: Node) -> list[Node]:
    return list(schema.get("oneOf", schema.get("anyOf", ())))


def _types(schema: Node) -> list[str]:
    type_ = schema.get("type", [])
    return [type_] if isinstance(type_, str) else list(type_)


def _listed(values: Iterable[Any]) -> Html:
    return join((tag("code", _plain(value)) for value in values), ", ")


def _limits(schema: Node) -> list[str]:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return [f"{_plain(low)} to {_plain(high)}"]
    return [phrase.format(_plain(schema[key])) for phrase, key in _LIMITS if key in schema]


def _plain(value: Any) -> str:
    """A value as one writes it: a whole number without its point, with thousands apart."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
