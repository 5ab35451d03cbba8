"""A command line for an operation, to be pasted into a shell. What the caller must supply is a shell variable in it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

from service.api.docs.markup import Html, join, tag
from service.api.docs.schemas import Field, Node, Schemas, is_file

ORIGIN = tag("i", "$GATEWAY", data_fill="origin")
TOKEN = tag("i", "$TOKEN", data_fill="token")

_PLACEHOLDER = re.compile(r"\{([^}]*)\}")
_SPECIAL = re.compile(r'([\\"$`])')
_FORM_OPTIONS = {"multipart/form-data": "-F", "application/x-www-form-urlencoded": "--data-urlencode"}


def command(schemas: Schemas, method: str, path: str, operation: Node) -> Html:
    """The call with its credentials and all it requires, and with whatever else the document has an example for."""
    parameters = [schemas.resolve(parameter) for parameter in operation.get("parameters", ())]
    body = list(_body(schemas, operation))
    verb = "" if method == ("post" if body else "get") else f"-X {method.upper()} "
    options = f"{verb}{_reading(schemas, operation)}"
    lines = [join([options, '"', ORIGIN, *_path(path), *_query(schemas, parameters), '"'])]
    lines += _credentials(schemas, operation)
    lines += [_header(parameter["name"], _value(schemas, parameter)) for parameter in _shown(parameters, "header")]
    return join([tag("b", "curl"), " ", join([*lines, *body], " \\\n  ")])


def _reading(schemas: Schemas, operation: Node) -> str:
    """The option for an answer that is a stream, or that is not for a terminal."""
    answers = [schemas.resolve(answer) for status, answer in operation.get("responses", {}).items() if status < "3"]
    types = {media_type for answer in answers for media_type in answer.get("content", {})}
    if "text/event-stream" in types:
        return "-N "
    return "" if all(type_.startswith("text/") or type_.endswith("json") for type_ in types) else "-O "


def _path(path: str) -> Iterator[Html]:
    for index, piece in enumerate(_PLACEHOLDER.split(path)):
        yield _variable(piece) if index % 2 else join([_quotable(piece)])


def _query(schemas: Schemas, parameters: list[Node]) -> Iterator[Html]:
    for index, parameter in enumerate(_shown(parameters, "query")):
        yield join(["&" if index else "?", _quotable(parameter["name"]), "=", _value(schemas, parameter)])


def _credentials(schemas: Schemas, operation: Node) -> Iterator[Html]:
    for requirement in operation.get("security", schemas.security)[:1]:
        for name in requirement:
            scheme = schemas.resolve({"$ref": f"#/components/securitySchemes/{name}"})
            yield _header("Authorization", join([f"{scheme['scheme'].capitalize()} ", TOKEN]))


def _body(schemas: Schemas, operation: Node) -> Iterator[Html]:
    content = schemas.resolve(operation.get("requestBody", {})).get("content", {})
    for media_type, option in _FORM_OPTIONS.items():
        if media_type in content:
            for field in schemas.fields(content[media_type].get("schema", {})):
                yield from _form_field(schemas, option, field)
            return
    if "application/json" in content:
        yield _header("Content-Type", Html("application/json"))
        written = json.dumps(schemas.media_sample(content["application/json"]), ensure_ascii=False)
        yield join(["-d ", shlex.quote(written)])


def _form_field(schemas: Schemas, option: str, field: Field) -> Iterator[Html]:
    schema = schemas.resolve(field.node)
    if is_file(schema):
        yield join([f"{option} ", shlex.quote(f"{field.name}=@{field.name}.png")])
    elif schema.get("format") == "password":
        yield join([f'{option} "{_quotable(field.name)}=', TOKEN, '"'])
    elif _has_example(schema) and schemas.sample(schema) != schema.get("default"):
        yield join([f"{option} ", shlex.quote(f"{field.name}={_text(schemas.sample(schema))}")])
    elif field.required:
        yield join([f'{option} "{_quotable(field.name)}=', _variable(field.name), '"'])


def _shown(parameters: list[Node], place: str) -> list[Node]:
    return [
        parameter
        for parameter in parameters
        if parameter["in"] == place
        and (parameter.get("required") or _has_example(parameter) or _has_example(parameter.get("schema", {})))
    ]


def _has_example(node: Node) -> bool:
    return bool(node.get("examples"))


def _value(schemas: Schemas, parameter: Node) -> Html:
    """A parameter's example, else a variable of its name."""
    schema = schemas.resolve(parameter.get("schema", {}))
    if parameter.get("examples"):
        first = next(iter(parameter["examples"].values()))
        return join([_quotable(_text(schemas.resolve(first)["value"]))])
    if _has_example(schema):
        return join([_quotable(_text(schemas.sample(schema)))])
    return _variable(parameter["name"])


def _header(name: str, value: Html) -> Html:
    return join(['-H "', _quotable(name), ": ", value, '"'])


def _variable(name: str) -> Html:
    return tag("i", "$" + re.sub(r"\W+", "_", name, flags=re.ASCII).upper())


def _quotable(text: str) -> str:
    """Text as it stands between a shell's double quotes."""
    return _SPECIAL.sub(r"\\\1", text)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
