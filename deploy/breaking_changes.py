"""Find what the OpenAPI documents changed since the last release that breaks a client written against it.

python -m deploy.breaking_changes

`openapi/released/` has the documents of the last release, and `accepted.txt` the lines of changes that are meant, with
`*` for any text. PyPI, npm and Debian have no tool for it that is maintained and works offline (oasdiff is in none).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

FOLDER = Path(__file__).parents[1] / "openapi"
Node = Mapping[str, Any]
_UPPER_BOUNDS = ("maximum", "maxLength", "maxItems")
_LOWER_BOUNDS = ("minimum", "minLength")
_EXACT_WORDS = ("pattern", "format", "uniqueItems")


def find_breaking_changes(old: Node, new: Node) -> list[str]:
    """Return the changes between two documents after which a client of the old one may fail, as a line each."""
    comparison = _Comparison(old, new)
    found: list[str] = []
    for path, methods in old["paths"].items():
        for method, operation in methods.items():
            name = f"{method.upper()} {path}"
            if changed := new["paths"].get(path, {}).get(method):
                found += [f"{name}: {change}" for change in comparison.compare_operations(operation, changed)]
            else:
                found.append(f"{name}: is removed")
    return found


class _Comparison:
    """A comparison of two documents: what one side sends, the other must accept. In a request the client sends."""

    def __init__(self, old: Node, new: Node) -> None:
        self._old = old
        self._new = new
        self._compared: set[tuple[str, str]] = set()
        """References that are being compared: schemas may refer to themselves."""

    def compare_operations(self, old: Node, new: Node) -> Iterator[str]:
        if old["operationId"] != new["operationId"]:
            yield f"operation {old['operationId']} is renamed"
        yield from self._compare_parameters(_parameters(old), _parameters(new))
        new_body = new.get("requestBody", {})
        old_body = old.get("requestBody", {})
        if new_body.get("required") and not old_body.get("required"):
            yield "its body is required"
        yield from self._compare_contents("body", old_body, new_body, is_request=True)
        for status, response in old["responses"].items():
            if not status.startswith("2"):
                continue
            if status not in new["responses"]:
                yield f"{status} is removed"
                continue
            changed = self._resolve(self._new, new["responses"][status])
            before = self._resolve(self._old, response)
            for header in before.get("headers", {}).keys() - changed.get("headers", {}).keys():
                yield f"{status}: header {header} is removed"
            yield from self._compare_contents(status, before, changed, is_request=False)

    def _compare_parameters(self, old: Mapping[str, Node], new: Mapping[str, Node]) -> Iterator[str]:
        for name, parameter in old.items():
            if name not in new:
                yield f"{name} is removed"
                continue
            if new[name].get("required") and not parameter.get("required"):
                yield f"{name} is required"
            yield from self._compare_schemas(name, parameter["schema"], new[name]["schema"], is_request=True)
        yield from (f"{name} is required" for name in new.keys() - old.keys() if new[name].get("required"))

    def _compare_contents(self, place: str, old: Node, new: Node, *, is_request: bool) -> Iterator[str]:
        for media_type, content in old.get("content", {}).items():
            if changed := new.get("content", {}).get(media_type):
                yield from self._compare_schemas(place, content["schema"], changed["schema"], is_request=is_request)
            else:
                yield f"{place}: {media_type} is removed"

    def _compare_schemas(self, place: str, old: Node, new: Node, *, is_request: bool) -> Iterator[str]:
        references = old.get("$ref", ""), new.get("$ref", "")
        if references in self._compared:
            return
        if all(references):
            self._compared.add(references)
        sent, accepted = self._alternatives(self._old, old), self._alternatives(self._new, new)
        if not is_request:
            sent, accepted = accepted, sent
        for one in sent:
            candidates = [other for other in accepted if _accepts_type(other, one)]
            found = [list(self._compare_alternatives(place, one, other, is_request=is_request)) for other in candidates]
            yield from min(found, key=len, default=[f"{place}: {one.get('type')} is " + _fault(is_request)])
        self._compared.discard(references)

    def _compare_alternatives(self, place: str, sent: Node, accepted: Node, *, is_request: bool) -> Iterator[str]:
        if (values := _values(accepted)) is not None:
            new_values = [value for value in _values(sent) or ["any value"] if value not in values]
            yield from (f"{place}: {value} is " + _fault(is_request) for value in new_values)
        for word in (*_UPPER_BOUNDS, *_LOWER_BOUNDS, *_EXACT_WORDS):
            if not _is_within(word, sent.get(word), accepted.get(word)):
                old, new = (sent, accepted) if is_request else (accepted, sent)
                yield f"{place}: {word} is " + (f"{new.get(word)}, was {old[word]}" if word in old else "new")
        for name in sorted({*accepted.get("required", ())} - {*sent.get("required", ())}):
            yield f"{place}.{name} is " + ("required" if is_request else "optional")
        old, new = (sent, accepted) if is_request else (accepted, sent)
        for name, schema in old.get("properties", {}).items():
            if changed := new.get("properties", {}).get(name):
                yield from self._compare_schemas(f"{place}.{name}", schema, changed, is_request=is_request)
            else:
                yield f"{place}.{name} is removed"
        if is_request:
            yield from _compare_tolerance(place, old, new)
        for word in ("items", "additionalProperties"):
            if isinstance(old.get(word), Mapping) and isinstance(new.get(word), Mapping):
                yield from self._compare_schemas(f"{place}[]", old[word], new[word], is_request=is_request)

    def _alternatives(self, document: Node, schema: Node) -> Sequence[Node]:
        schema = self._resolve(document, schema)
        for word in ("oneOf", "anyOf"):
            if word in schema:
                return [other for option in schema[word] for other in self._alternatives(document, option)]
        return [schema]

    @staticmethod
    def _resolve(document: Node, node: Node) -> Node:
        while "$ref" in node:
            target = document
            for key in node["$ref"].removeprefix("#/").split("/"):
                target = target[key]
            node = target
        return node


def _compare_tolerance(place: str, old: Node, new: Node) -> Iterator[str]:
    """Compare what a request may leave out and add."""
    if new.get("additionalProperties") is False and old.get("additionalProperties") is not False:
        yield f"{place}: other fields are refused"
    if "default" in old and old["default"] != new.get("default"):
        yield f"{place}: default is {new.get('default')}, was {old['default']}"


def _parameters(operation: Node) -> dict[str, Node]:
    return {f"{parameter['in']} {parameter['name']}": parameter for parameter in operation.get("parameters", ())}


def _fault(is_request: bool) -> str:
    return "refused" if is_request else "new"


def _accepts_type(accepted: Node, sent: Node) -> bool:
    types = sent.get("type"), accepted.get("type")
    return types[1] in {None, types[0]} or types == ("integer", "number")


def _values(schema: Node) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _is_within(word: str, sent: Any, accepted: Any) -> bool:
    if accepted is None or sent == accepted:
        return True
    if sent is None or word in _EXACT_WORDS:
        return False
    return bool(sent <= accepted if word in _UPPER_BOUNDS else sent >= accepted)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER)
def main(folder: Path) -> None:
    """Fail if the documents have changes that break a client and are not accepted."""
    released = folder / "released"
    found = []
    for path in sorted(released.glob("*.yaml")):
        old, new = (yaml.load(file.read_bytes(), yaml.CSafeLoader) for file in (path, folder / path.name))
        found += [f"{path.stem}: {change}" for change in find_breaking_changes(old, new)]
    lines = (released / "accepted.txt").read_text("utf-8").splitlines()
    accepted = [re.escape(line).replace(r"\*", ".*") for line in lines if line and not line.startswith("#")]
    refused = [change for change in found if not any(re.fullmatch(pattern, change) for pattern in accepted)]
    click.echo("\n".join(refused), nl=bool(refused))
    sys.exit(bool(refused))


if __name__ == "__main__":
    main()
