"""The page itself: one HTML file, rendered once, that carries its style and its script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from service.api.docs.markup import Html, join, line, prose, tag
from service.api.docs.operations import Operation, Operations
from service.api.docs.schemas import Node, Schemas, anchor

HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": "frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
)
"""To be sent with the page. The rest of its content security policy stands in the page, beside what it allows."""

_METHODS = ("get", "post", "put", "patch", "delete")


def docs_page(document: Mapping[str, Any]) -> bytes:
    """Render an OpenAPI 3.1 document as an HTML page in UTF-8, to be served beside the document's `openapi.json`."""
    info, schemas = document["info"], Schemas(document)
    operations, groups = Operations(schemas), _grouped(document)
    articles = {name: [operations.render(operation) for operation in group] for name, group in groups.items()}
    # After the operations, which say as they are rendered what there is to look up.
    reference = {"Problems": _problems(operations), "Objects": _objects(schemas, operations)}
    shown = {title: content for title, content in reference.items() if content is not None}
    style, script = _asset("page.css"), _asset("page.js")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", info["title"]),
        tag("link", rel="icon", href="data:,"),
        tag("style", style),
    )
    main = tag(
        "main",
        tag("h1", info["title"], " ", tag("small", info["version"])),
        prose(info.get("description", "")),
        _calling(document, schemas),
        *(_group(document, name, group) for name, group in articles.items()),
        *(tag("section", tag("h2", title), content, id=anchor(title)) for title, content in shown.items()),
        id="content",
    )
    body = tag(
        "body",
        tag("a", "Skip to the content", class_="skip", href="#content"),
        _contents(info["title"], groups, shown),
        main,
        tag("script", script),
    )
    return ("<!doctype html>\n" + tag("html", head, body, lang="en")).encode()


def _grouped(document: Node) -> dict[str, list[Operation]]:
    """The operations by their first tag, in the order in which the document declares the tags."""
    groups: dict[str, list[Operation]] = {each["name"]: [] for each in document.get("tags", ())}
    for path, item in document.get("paths", {}).items():
        for method in _METHODS:
            if method in item:
                name = (item[method].get("tags") or ["Other"])[0]
                groups.setdefault(name, []).append(Operation(method, path, item[method]))
    return {name: group for name, group in groups.items() if group}


def _contents(title: str, groups: Mapping[str, Iterable[Operation]], reference: Iterable[str]) -> Html:
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


def _calling(document: Node, schemas: Schemas) -> Html:
    schemes = document.get("components", {}).get("securitySchemes", {}).values()
    return tag(
        "section",
        tag("h2", "Calling it"),
        *(prose(schemas.resolve(scheme).get("description", "")) for scheme in schemes),
        tag(
            "p",
            line(
                "Every example is a command for a shell, with variables for what only you know: `$GATEWAY` is the "
                "address of this service, `$TOKEN` your token. "
            ),
            tag("a", "The OpenAPI document", href="openapi.json"),
            " says the same to programs.",
        ),
        tag(
            "div",
            tag("label", "Address", tag("input", id="origin", spellcheck="false")),
            tag("label", "Token", tag("input", id="token", placeholder="paste yours", autocomplete="off")),
            tag("p", "They go into the examples on this page and nowhere else."),
            class_="fill",
            hidden=True,
        ),
        id="calling",
    )


def _group(document: Node, name: str, articles: Iterable[Html]) -> Html:
    about = [each.get("description", "") for each in document.get("tags", ()) if each["name"] == name]
    return tag("section", tag("h2", name), *map(prose, about), *articles, id=anchor("group", name))


def _problems(operations: Operations) -> Html | None:
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


def _objects(schemas: Schemas, operations: Operations) -> Html | None:
    """Every object that something on the page points to; describing one may point to more."""
    shown: dict[str, Html] = {}
    while waiting := [name for name in schemas.linked if name not in shown]:
        for name in waiting:
            schema = schemas.linked[name]
            shown[name] = tag(
                "article",
                tag("h3", name),
                prose(schema.get("description", "")),
                operations.described(schemas.fields(schema)),
                id=anchor("schema", name),
            )
    return join(shown.values()) if shown else None


def _asset(name: str) -> Html:
    return Html(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _policy(style: str, script: str) -> str:
    """Nothing may be loaded, sent or run but the style and the script of this very page."""
    return (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
