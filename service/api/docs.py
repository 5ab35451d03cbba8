"""The page at `/docs`: the OpenAPI document as HTML without external resources."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal

from msgspec import Struct, structs

_VOID = frozenset({"input", "link", "meta", "wbr"})
_CODE = re.compile(r"`([^`]+)`")
_BULLET = re.compile(r"\s*[-*] ")
_JSON_KEY = re.compile(r'( *)("(?:[^"\\]|\\.)*")(: .*)')


class Html(str):
    """Markup. Any other string is text, which is escaped when it is joined."""

    __slots__ = ()


def join(parts: Iterable[str | None], separator: str = "") -> Html:
    return Html(_escape_part(separator).join(_escape_part(part) for part in parts if part is not None))


def tag(name: str, /, *children: str | None, **attributes: str | Literal[True]) -> Html:
    """Make an element; `class_` is the attribute class, `aria_label` is aria-label, True has no value."""
    head = name
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        head += f" {attribute}" if value is True else f' {attribute}="{escape(value)}"'
    return Html(f"<{head}>") if name in _VOID else Html(f"<{head}>{join(children)}</{name}>")


def line(text: str) -> Html:
    """Render text with `code` in it."""
    pieces = _CODE.split(text)
    return join(tag("code", piece) if index % 2 else piece for index, piece in enumerate(pieces))


def prose(text: str) -> Html:
    """Render paragraphs and lists with `code` in them."""
    return join(_render_block(block) for block in re.split(r"\n\s*\n", text.strip()) if block)


def json_lines(value: Any) -> Html:
    lines = json.dumps(value, indent=2, ensure_ascii=False).split("\n")
    return join((_highlight_key(text) for text in lines), "\n")


def _render_block(block: str) -> Html:
    lines = block.split("\n")
    if not all(_BULLET.match(text) for text in lines):
        return tag("p", line(" ".join(text.strip() for text in lines)))
    return tag("ul", *(tag("li", line(_BULLET.sub("", text, count=1))) for text in lines))


def _highlight_key(text: str) -> Html:
    key = _JSON_KEY.fullmatch(text)
    return join([key[1], tag("b", key[2]), key[3]]) if key else join([text])


def _escape_part(part: str | None) -> str:
    return part if isinstance(part, Html) else escape(part or "", quote=False)


Node = Mapping[str, Any]
_FORMAT_SAMPLES = {"date-time": "2026-01-31T12:00:00Z", "date": "2026-01-31", "uri": "https://example.com/"}
_TYPE_NAMES = {
    "array": "list",
    "boolean": "true or false",
    "null": "null",
    "number": "number",
    "integer": "integer",
    "object": "object",
    "string": "string",
}
_LIMIT_PHRASES = (
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
    """A property of an object, or a field of a form."""

    name: str
    node: Node
    required: bool


class Schemas:
    """Reads the schemas of a document.

    `linked_objects` collects the objects that the page refers to and must show.
    """

    def __init__(self, document: Node) -> None:
        self._document = document
        self.security: Sequence[Node] = document.get("security", ())
        self.linked_objects: dict[str, Node] = {}

    def resolve(self, node: Node) -> Node:
        """Follow a reference, and merge the parts of an `allOf`."""
        while "$ref" in node:
            target: Any = self._document
            for step in node["$ref"].removeprefix("#/").split("/"):
                target = target[step.replace("~1", "/").replace("~0", "~")]
            node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
        merged = {key: value for key, value in node.items() if key != "allOf"}
        for part in map(self.resolve, node.get("allOf", ())):
            merged = {**part, **merged, "properties": {**part.get("properties", {}), **merged.get("properties", {})}}
        return merged

    def fields(self, node: Node) -> list[Field]:
        schema = self.resolve(node)
        required = schema.get("required", ())
        return [Field(name, field, name in required) for name, field in schema.get("properties", {}).items()]

    def without_null(self, node: Node) -> Node:
        """Return the schema of a value that is present: parameters and forms have no null."""
        options = [option for option in _list_alternatives(node) if option.get("type") != "null"]
        if len(options) != 1:
            return node
        return {**options[0], **{key: value for key, value in node.items() if key not in {"oneOf", "anyOf"}}}

    def choices(self, node: Node) -> list[Any]:
        schema = self.resolve(node)
        return [schema["const"]] if "const" in schema else list(schema.get("enum", ()))

    def describe(self, node: Node) -> Html:
        """Describe type, range and default of a value, with links to objects."""
        schema = self.resolve(node)
        name = node.get("$ref", "").rpartition("/")[2]
        if name and schema.get("properties"):
            self.linked_objects[name] = schema
            return tag("a", name, href=f"#{anchor('schema', name)}")
        parts = [self._describe_kind(schema), *_describe_limits(schema)]
        if examples := [value for value in schema.get("examples", ()) if value != schema.get("default")]:
            parts.append(join(["such as ", _render_values(examples)]))
        if schema.get("default") is not None:
            parts.append(
                join(["default ", _render_values([schema["default"]])]) if schema["default"] != "" else "default empty"
            )
        return join(parts, ", ")

    def sample(self, node: Node, within: frozenset[str] = frozenset()) -> Any:
        """Return a sample value, the document's own example if it has one."""
        schema = self.resolve(node)
        values = [*schema.get("examples", ()), *self.choices(schema)]
        values += [schema["default"]] if schema.get("default") is not None else []
        if values:
            return values[0]
        reference = node.get("$ref", "")
        if reference in within or "null" in [
            *_list_types(schema),
            *(option.get("type") for option in _list_alternatives(schema)),
        ]:
            return None
        within |= {reference} - {""}
        if _list_alternatives(schema):
            return self.sample(_list_alternatives(schema)[0], within)
        type_ = next(iter(_list_types(schema)), "string")
        if type_ == "object":
            return {field.name: self.sample(field.node, within) for field in self.fields(schema)}
        if type_ == "array":
            return [self.sample(schema.get("items", {}), within)]
        number, text = schema.get("minimum", 1), _FORMAT_SAMPLES.get(schema.get("format", ""), "…")
        return {"boolean": True, "integer": number, "number": number}.get(type_, text)

    def media_sample(self, media: Node) -> Any:
        for example in media.get("examples", {}).values():
            return self.resolve(example)["value"]
        return self.sample(media.get("schema", {}))

    def _describe_kind(self, schema: Node) -> Html:
        if _list_alternatives(schema):
            return join(map(self.describe, _list_alternatives(schema)), " or ")
        if choices := self.choices(schema):
            return join(["one of ", _render_values(choices)])
        if is_file(schema):
            return Html("file")
        return join((self._describe_type(type_, schema) for type_ in _list_types(schema)), " or ") or Html("any value")

    def _describe_type(self, type_: str, schema: Node) -> Html:
        parts = [_TYPE_NAMES.get(type_, type_)]
        items = {"array": "items", "object": "additionalProperties"}.get(type_)
        if items and isinstance(schema.get(items), Mapping) and schema[items]:
            return join([*parts, " of ", self.describe(schema[items])])
        shape = schema.get("format", schema.get("contentMediaType", "password"))
        if type_ == "string" and shape != "password":
            return join([*parts, ", ", shape])
        return join(parts)


def is_file(schema: Node) -> bool:
    media_type = schema.get("contentMediaType", "text/plain")
    return schema.get("format") == "binary" or not (media_type.startswith("text/") or media_type.endswith("json"))


def anchor(*words: str) -> str:
    """Return the id of an element on the page."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def _list_alternatives(schema: Node) -> list[Node]:
    return list(schema.get("oneOf", schema.get("anyOf", ())))


def _list_types(schema: Node) -> list[str]:
    type_ = schema.get("type", [])
    return [type_] if isinstance(type_, str) else list(type_)


def _render_values(values: Iterable[Any]) -> Html:
    return join((tag("code", _format_value(value)) for value in values), ", ")


def _describe_limits(schema: Node) -> list[str]:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return [f"{_format_value(low)} to {_format_value(high)}"]
    return [phrase.format(_format_value(schema[key])) for phrase, key in _LIMIT_PHRASES if key in schema]


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


ORIGIN = tag("i", "$GATEWAY", data_fill="origin")
TOKEN = tag("i", "$TOKEN", data_fill="token")
_PLACEHOLDER = re.compile(r"\{([^}]*)\}")
_SPECIAL = re.compile(r'([\\"$`])')
_FORM_OPTIONS = {"multipart/form-data": "-F", "application/x-www-form-urlencoded": "--data-urlencode"}


def render_curl(schemas: Schemas, method: str, path: str, operation: Node) -> Html:
    """Render the call with credentials, required parameters and those that have examples."""
    parameters = [schemas.resolve(parameter) for parameter in operation.get("parameters", ())]
    body = list(_render_body(schemas, operation))
    verb = "" if method == ("post" if body else "get") else f"-X {method.upper()} "
    options = f"{verb}{_output_option(schemas, operation)}"
    lines = [join([options, '"', ORIGIN, *_render_path(path), *_render_query(schemas, parameters), '"'])]
    lines += _render_credentials(schemas, operation)
    lines += [
        _render_header(parameter["name"], _render_value(schemas, parameter))
        for parameter in _example_parameters(parameters, "header")
    ]
    return join([tag("b", "curl"), " ", join([*lines, *body], " \\\n  ")])


def _output_option(schemas: Schemas, operation: Node) -> str:
    all_responses = operation.get("responses", {}).items()
    successes = [schemas.resolve(response) for status, response in all_responses if status < "3"]
    types = {media_type for response in successes for media_type in response.get("content", {})}
    if "text/event-stream" in types:
        return "-N "
    return "" if all(type_.startswith("text/") or type_.endswith("json") for type_ in types) else "-O "


def _render_path(path: str) -> Iterator[Html]:
    for index, piece in enumerate(_PLACEHOLDER.split(path)):
        yield _render_variable(piece) if index % 2 else join([_escape_quoted(piece)])


def _render_query(schemas: Schemas, parameters: list[Node]) -> Iterator[Html]:
    for index, parameter in enumerate(_example_parameters(parameters, "query")):
        yield join(["&" if index else "?", _escape_quoted(parameter["name"]), "=", _render_value(schemas, parameter)])


def _render_credentials(schemas: Schemas, operation: Node) -> Iterator[Html]:
    for requirement in operation.get("security", schemas.security)[:1]:
        for name in requirement:
            scheme = schemas.resolve({"$ref": f"#/components/securitySchemes/{name}"})
            yield _render_header("Authorization", join([f"{scheme['scheme'].capitalize()} ", TOKEN]))


def _render_body(schemas: Schemas, operation: Node) -> Iterator[Html]:
    content = schemas.resolve(operation.get("requestBody", {})).get("content", {})
    for media_type, option in _FORM_OPTIONS.items():
        if media_type in content:
            for field in schemas.fields(content[media_type].get("schema", {})):
                yield from _render_form_field(schemas, option, field)
            return
    if "application/json" in content:
        yield _render_header("Content-Type", Html("application/json"))
        body = json.dumps(schemas.media_sample(content["application/json"]), ensure_ascii=False)
        yield join(["-d ", shlex.quote(body)])


def _render_form_field(schemas: Schemas, option: str, field: Field) -> Iterator[Html]:
    schema = schemas.resolve(field.node)
    if is_file(schema):
        yield join([f"{option} ", shlex.quote(f"{field.name}=@{field.name}.png")])
    elif schema.get("format") == "password":
        yield join([f'{option} "{_escape_quoted(field.name)}=', TOKEN, '"'])
    elif _has_example(schema) and schemas.sample(schema) != schema.get("default"):
        yield join([f"{option} ", shlex.quote(f"{field.name}={_to_text(schemas.sample(schema))}")])
    elif field.required:
        yield join([f'{option} "{_escape_quoted(field.name)}=', _render_variable(field.name), '"'])


def _example_parameters(parameters: list[Node], place: str) -> list[Node]:
    return [
        parameter
        for parameter in parameters
        if parameter["in"] == place
        and (parameter.get("required") or _has_example(parameter) or _has_example(parameter.get("schema", {})))
    ]


def _has_example(node: Node) -> bool:
    return bool(node.get("examples"))


def _render_value(schemas: Schemas, parameter: Node) -> Html:
    schema = schemas.resolve(parameter.get("schema", {}))
    if parameter.get("examples"):
        first = next(iter(parameter["examples"].values()))
        return join([_escape_quoted(_to_text(schemas.resolve(first)["value"]))])
    if _has_example(schema):
        return join([_escape_quoted(_to_text(schemas.sample(schema)))])
    return _render_variable(parameter["name"])


def _render_header(name: str, value: Html) -> Html:
    return join(['-H "', _escape_quoted(name), ": ", value, '"'])


def _render_variable(name: str) -> Html:
    return tag("i", "$" + re.sub(r"\W+", "_", name, flags=re.ASCII).upper())


def _escape_quoted(text: str) -> str:
    """Escape text between double quotes of a shell."""
    return _SPECIAL.sub(r"\\\1", text)


def _to_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_PARAMETER_TITLES = {"path": "Path", "query": "Query", "header": "Headers"}
_FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
_PROBLEM_TYPE = "application/problem+json"
_PROBLEM_ITEM = re.compile(r"^- `([^`]+)`: (.*)$", re.MULTILINE)


class Operation(Struct, frozen=True):
    """A path and a method with their part of the document."""

    method: str
    path: str
    node: Node

    @property
    def anchor(self) -> str:
        return anchor(self.method, self.path)

    @property
    def title(self) -> Html:
        path = join(re.split(r"(?=[/_])", self.path), tag("wbr"))
        return join([tag("span", self.method.upper(), class_=f"method {self.method}"), " ", tag("code", path)])


class ProblemEntry(Struct, frozen=True):
    """A kind of problem."""

    status: str
    code: str
    meaning: str


class Operations:
    """Renders operations; `problems` collects their problems by code."""

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self.problems: dict[str, ProblemEntry] = {}

    def render(self, operation: Operation) -> Html:
        node = operation.node
        text = [
            tag("p", node["summary"], class_="summary") if "summary" in node else None,
            prose(node.get("description", "")),
            *self._render_parameters(node),
            *self._render_body(node),
            tag("h4", "Responses"),
            *self._render_responses(node),
        ]
        panels = [
            render_panel("Call", render_curl(self._schemas, operation.method, operation.path, node)),
            *self._render_sample(node),
        ]
        return tag(
            "article",
            tag(
                "h3",
                tag("a", operation.title, href=f"#{operation.anchor}"),
                tag("span", "deprecated", class_="note") if node.get("deprecated") else None,
            ),
            tag("div", tag("div", *text), tag("div", *panels, class_="panels"), class_="pair"),
            id=operation.anchor,
        )

    def render_fields(self, fields: Iterable[Field]) -> Html:
        return tag("dl", *(self._render_field(field, None if field.required else "optional") for field in fields))

    def _render_inputs(self, fields: Iterable[Field]) -> Html:
        return tag("dl", *(self._render_field(field, "required" if field.required else None) for field in fields))

    def _render_field(self, field: Field, note: str | None) -> Html:
        description = self._schemas.resolve(field.node).get("description", "")
        return tag(
            "div",
            tag("dt", tag("code", field.name), " ", tag("span", note, class_="note") if note else None),
            tag("dd", tag("span", self._schemas.describe(field.node), class_="type"), prose(description)),
        )

    def _render_parameters(self, node: Node) -> Iterator[Html]:
        parameters = [self._schemas.resolve(parameter) for parameter in node.get("parameters", ())]
        for place, title in _PARAMETER_TITLES.items():
            fields = [self._to_field(parameter) for parameter in parameters if parameter["in"] == place]
            if fields:
                yield join([tag("h4", title), self._render_inputs(fields)])

    def _to_field(self, parameter: Node) -> Field:
        schema = self._schemas.without_null(parameter.get("schema", {}))
        described = {"description": parameter["description"]} if "description" in parameter else {}
        return Field(parameter["name"], {**schema, **described}, bool(parameter.get("required")))

    def _render_body(self, node: Node) -> Iterator[Html]:
        body = self._schemas.resolve(node.get("requestBody", {}))
        for media_type, media in body.get("content", {}).items():
            fields = self._schemas.fields(media.get("schema", {}))
            if media_type in _FORM_TYPES:
                fields = [structs.replace(field, node=self._schemas.without_null(field.node)) for field in fields]
            yield tag("h4", "Form fields" if media_type in _FORM_TYPES else "Body", " ", tag("small", media_type))
            yield prose(body.get("description", ""))
            yield self._render_inputs(fields)

    def _render_responses(self, node: Node) -> Iterator[Html]:
        rows = []
        for status, reference in sorted(node.get("responses", {}).items()):
            response = self._schemas.resolve(reference)
            headers = response.get("headers", {})
            if problems := self._collect_problems(status, response):
                links = join((tag("a", code, href=f"#{anchor('problem', code)}") for code in problems), ", ")
                names = join((tag("code", name) for name in headers), ", ")
                parts = [links, tag("small", " with ", names) if headers else None]
            else:
                parts = [line(response["description"]), *self._render_media_types(response if status < "4" else {})]
                parts += [self._render_header(name, header) for name, header in headers.items()]
            label = "else" if status == "default" else status
            rows.append(tag("li", tag("span", label, class_=f"status s{status[0]}"), " ", tag("div", *parts)))
        yield tag("ul", *rows, class_="answers")

    def _render_header(self, name: str, header: Node) -> Html:
        description = self._schemas.resolve(header).get("description", "")
        return tag("div", tag("code", name), " ", line(description), class_="header")

    def _render_media_types(self, response: Node) -> Iterator[Html]:
        for media_type, media in response.get("content", {}).items():
            description = join([": ", self._schemas.describe(media["schema"])]) if media.get("schema") else None
            yield join([description, " ", tag("small", media_type)])

    def _collect_problems(self, status: str, response: Node) -> list[str]:
        # Their description lists the codes.
        items = _PROBLEM_ITEM.findall(response["description"]) if _PROBLEM_TYPE in response.get("content", {}) else []
        for code, meaning in items:
            self.problems.setdefault(code, ProblemEntry(status, code, meaning))
        return [code for code, _ in items]

    def _render_sample(self, node: Node) -> Iterator[Html]:
        for status, reference in node.get("responses", {}).items():
            media = self._schemas.resolve(reference).get("content", {}).get("application/json")
            if status < "4" and media:
                yield render_panel(f"{status}", json_lines(self._schemas.media_sample(media)))
                return


def render_panel(title: str, code: Html) -> Html:
    """Render code under a title, with a button that copies it."""
    return tag(
        "figure",
        tag("figcaption", title, tag("button", "Copy", type="button", hidden=True)),
        tag("pre", tag("code", code), tabindex="0"),
    )


DOCS_HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": "frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
)
"""Headers of the page. The rest of its content security policy is in the page, with the hashes that it allows."""
_METHODS = ("get", "post", "put", "patch", "delete")


def docs_page(document: Mapping[str, Any]) -> bytes:
    """Render an OpenAPI 3.1 document as an HTML page in UTF-8.

    It links to `openapi.json` beside it. Its content security policy lets it load and send nothing.
    """
    info, schemas = document["info"], Schemas(document)
    operations, groups = Operations(schemas), _group_operations(document)
    articles = {name: [operations.render(operation) for operation in group] for name, group in groups.items()}
    # Rendered after the operations, which collect the problems and objects they refer to.
    reference = {"Problems": _render_problems(operations), "Objects": _render_objects(schemas, operations)}
    sections = {title: content for title, content in reference.items() if content is not None}
    style, script = _read_asset("docs.css"), _read_asset("docs.js")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_security_policy(style, script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", info["title"]),
        tag("link", rel="icon", href="data:,"),
        tag("style", style),
    )
    main = tag(
        "main",
        tag("h1", info["title"], " ", tag("small", info["version"])),
        prose(info.get("description", "")),
        _render_introduction(document, schemas),
        *(_render_group(document, name, group) for name, group in articles.items()),
        *(tag("section", tag("h2", title), content, id=anchor(title)) for title, content in sections.items()),
        id="content",
    )
    body = tag(
        "body",
        tag("a", "Skip to the content", class_="skip", href="#content"),
        _render_contents(info["title"], groups, sections),
        main,
        tag("script", script),
    )
    return ("<!doctype html>\n" + tag("html", head, body, lang="en")).encode()


def _group_operations(document: Node) -> dict[str, list[Operation]]:
    groups: dict[str, list[Operation]] = {entry["name"]: [] for entry in document.get("tags", ())}
    for path, item in document.get("paths", {}).items():
        for method in _METHODS:
            if method in item:
                name = (item[method].get("tags") or ["Other"])[0]
                groups.setdefault(name, []).append(Operation(method, path, item[method]))
    return {name: group for name, group in groups.items() if group}


def _render_contents(title: str, groups: Mapping[str, Iterable[Operation]], reference: Iterable[str]) -> Html:
    lists: dict[str, list[tuple[str, str]]] = {
        name: [(operation.title, operation.anchor) for operation in group] for name, group in groups.items()
    }
    lists["Reference"] = [(name, anchor(name)) for name in reference]
    parts = [
        join([tag("p", name), tag("ul", *(tag("li", tag("a", text, href=f"#{place}")) for text, place in links))])
        for name, links in lists.items()
    ]
    return tag(
        "nav",
        tag("a", title, class_="brand", href="#content"),
        tag("details", tag("summary", "Contents"), *parts, open=True),
        aria_label="Contents",
    )


def _render_introduction(document: Node, schemas: Schemas) -> Html:
    schemes = document.get("components", {}).get("securitySchemes", {}).values()
    return tag(
        "section",
        tag("h2", "Calls"),
        *(prose(schemas.resolve(scheme).get("description", "")) for scheme in schemes),
        tag(
            "p",
            line(
                "Every example is a shell command with variables: `$GATEWAY` is the address of this service, `$TOKEN` "
                "your token. "
            ),
            tag("a", "The OpenAPI document", href="openapi.json"),
            " is the same for programs.",
        ),
        tag(
            "div",
            tag("label", "Address", tag("input", id="origin", spellcheck="false")),
            tag("label", "Token", tag("input", id="token", placeholder="paste yours", autocomplete="off")),
            tag("p", "Used in the examples on this page only, and sent nowhere."),
            class_="fill",
            hidden=True,
        ),
        id="calling",
    )


def _render_group(document: Node, name: str, articles: Iterable[Html]) -> Html:
    texts = [entry.get("description", "") for entry in document.get("tags", ()) if entry["name"] == name]
    return tag("section", tag("h2", name), *map(prose, texts), *articles, id=anchor("group", name))


def _render_problems(operations: Operations) -> Html | None:
    problems = sorted(operations.problems.values(), key=lambda problem: (problem.status, problem.code))
    rows = [
        tag(
            "tr",
            tag("td", tag("span", problem.status, class_=f"status s{problem.status[0]}")),
            tag("th", tag("code", problem.code), scope="row"),
            tag("td", line(problem.meaning)),
            id=anchor("problem", problem.code),
        )
        for problem in problems
    ]
    heads = (tag("th", title, scope="col") for title in ("Status", "Code", "Meaning"))
    return tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows)) if rows else None


def _render_objects(schemas: Schemas, operations: Operations) -> Html | None:
    rendered: dict[str, Html] = {}
    # Rendering an object may link to more.
    while waiting := [name for name in schemas.linked_objects if name not in rendered]:
        for name in waiting:
            schema = schemas.linked_objects[name]
            rendered[name] = tag(
                "article",
                tag("h3", name),
                prose(schema.get("description", "")),
                operations.render_fields(schemas.fields(schema)),
                id=anchor("schema", name),
            )
    return join(rendered.values()) if rendered else None


def _read_asset(name: str) -> Html:
    return Html(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _security_policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; style-src {_hash_source(style)}; script-src {_hash_source(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )


def _hash_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
