"""One operation as a part of the page: what it takes, what it answers, and a command that calls it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from msgspec import Struct, structs

from service.api.docs.curl import command
from service.api.docs.markup import Html, join, json_lines, line, prose, tag
from service.api.docs.schemas import Field, Node, Schemas, anchor

_PLACES = {"path": "Path", "query": "Query", "header": "Headers"}
_FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
_PROBLEM = "application/problem+json"
_LISTED = re.compile(r"^- `([^`]+)`: (.*)$", re.MULTILINE)


class Operation(Struct, frozen=True):
    """A path and a method, with what the document says of the two."""

    method: str
    path: str
    node: Node

    @property
    def anchor(self) -> str:
        """Its place on the page."""
        return anchor(self.method, self.path)

    @property
    def title(self) -> Html:
        """How it is called, in short, with places where a long path may break."""
        path = join(re.split(r"(?=[/_])", self.path), tag("wbr"))
        return join([tag("span", self.method.upper(), class_=f"method {self.method}"), " ", tag("code", path)])


class Problem(Struct, frozen=True):
    """A kind of error: the status it comes with, its code, and what it means."""

    status: str
    code: str
    meaning: str


class Operations:
    """Renders operations; `problems` collects the errors they answer with, by code."""

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self.problems: dict[str, Problem] = {}

    def render(self, operation: Operation) -> Html:
        """The whole article on one operation."""
        node = operation.node
        said = [
            tag("p", node["summary"], class_="summary") if "summary" in node else None,
            prose(node.get("description", "")),
            *self._parameters(node),
            *self._body(node),
            tag("h4", "Answers"),
            *self._answers(node),
        ]
        shown = [panel("Call", command(self._schemas, operation.method, operation.path, node)), *self._sample(node)]
        return tag(
            "article",
            tag(
                "h3",
                tag("a", operation.title, href=f"#{operation.anchor}"),
                tag("span", "deprecated", class_="note") if node.get("deprecated") else None,
            ),
            tag("div", tag("div", *said), tag("div", *shown, class_="panels"), class_="pair"),
            id=operation.anchor,
        )

    def described(self, fields: Iterable[Field]) -> Html:
        """The fields of an object with what each holds, and which of them may be missing."""
        return tag("dl", *(self._field(field, None if field.required else "optional") for field in fields))

    def _taken(self, fields: Iterable[Field]) -> Html:
        """Parameters or fields with what each may hold, and which of them must be given."""
        return tag("dl", *(self._field(field, "required" if field.required else None) for field in fields))

    def _field(self, field: Field, note: str | None) -> Html:
        description = self._schemas.resolve(field.node).get("description", "")
        return tag(
            "div",
            tag("dt", tag("code", field.name), " ", tag("span", note, class_="note") if note else None),
            tag("dd", tag("span", self._schemas.words(field.node), class_="type"), prose(description)),
        )

    def _parameters(self, node: Node) -> Iterator[Html]:
        parameters = [self._schemas.resolve(parameter) for parameter in node.get("parameters", ())]
        for place, title in _PLACES.items():
            fields = [self._as_field(parameter) for parameter in parameters if parameter["in"] == place]
            if fields:
                yield join([tag("h4", title), self._taken(fields)])

    def _as_field(self, parameter: Node) -> Field:
        schema = self._schemas.present(parameter.get("schema", {}))
        described = {"description": parameter["description"]} if "description" in parameter else {}
        return Field(parameter["name"], {**schema, **described}, bool(parameter.get("required")))

    def _body(self, node: Node) -> Iterator[Html]:
        body = self._schemas.resolve(node.get("requestBody", {}))
        for media_type, media in body.get("content", {}).items():
            fields = self._schemas.fields(media.get("schema", {}))
            if media_type in _FORM_TYPES:
                fields = [structs.replace(field, node=self._schemas.present(field.node)) for field in fields]
            yield tag("h4", "Form fields" if media_type in _FORM_TYPES else "Body", " ", tag("small", media_type))
            yield prose(body.get("description", ""))
            yield self._taken(fields)

    def _answers(self, node: Node) -> Iterator[Html]:
        rows = []
        for status, reference in sorted(node.get("responses", {}).items()):
            response = self._schemas.resolve(reference)
            headers = response.get("headers", {})
            if problems := self._problems(status, response):
                links = join((tag("a", code, href=f"#{anchor('problem', code)}") for code in problems), ", ")
                named = join((tag("code", name) for name in headers), ", ")
                what = [links, tag("small", " with ", named) if headers else None]
            else:
                what = [line(response["description"]), *self._contents(response if status < "4" else {})]
                what += [self._header(name, header) for name, header in headers.items()]
            label = "else" if status == "default" else status
            rows.append(tag("li", tag("span", label, class_=f"status s{status[0]}"), " ", tag("div", *what)))
        yield tag("ul", *rows, class_="answers")

    def _header(self, name: str, header: Node) -> Html:
        description = self._schemas.resolve(header).get("description", "")
        return tag("div", tag("code", name), " ", line(description), class_="header")

    def _contents(self, response: Node) -> Iterator[Html]:
        for media_type, media in response.get("content", {}).items():
            words = join([": ", self._schemas.words(media["schema"])]) if media.get("schema") else None
            yield join([words, " ", tag("small", media_type)])

    def _problems(self, status: str, response: Node) -> list[str]:
        """The codes an answer can carry: its description lists each with what it means."""
        listed = _LISTED.findall(response["description"]) if _PROBLEM in response.get("content", {}) else []
        for code, meaning in listed:
            self.problems.setdefault(code, Problem(status, code, meaning))
        return [code for code, _ in listed]

    def _sample(self, node: Node) -> Iterator[Html]:
        for status, reference in node.get("responses", {}).items():
            media = self._schemas.resolve(reference).get("content", {}).get("application/json")
            if status < "4" and media:
                yield panel(f"{status}", json_lines(self._schemas.media_sample(media)))
                return


def panel(title: str, code: Html) -> Html:
    """A piece of code under a title, with a button that copies it where scripts run."""
    return tag(
        "figure",
        tag("figcaption", title, tag("button", "Copy", type="button", hidden=True)),
        tag("pre", tag("code", code), tabindex="0"),
    )
