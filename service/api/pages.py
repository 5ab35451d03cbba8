"""Pages for people: their frame, their files, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from itertools import pairwise
from typing import Any

from litestar import MediaType, Request, Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from litestar.response import Redirect
from msgspec import Struct

from service.domain.errors import NotFound

_PACKAGE = files("service")
_MEDIA_TYPES = {
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
    "jpg": "image/jpeg",
    "png": "image/png",
}
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_FRAME_FILES = ("style.css", "page.js", "icon.svg")


class Link(Struct, frozen=True):
    """An entry of the navigation; the path is that of the page below the gateway's address."""

    path: str
    label: str


def page_headers(*, images: str = "'self'", styles: str = "'self'") -> dict[str, str]:
    """Return the headers of a page and its files: nothing comes from or goes to another host, and nothing frames it.

    There are no headers of CORS: a page of another origin can neither send a token here nor read a response.
    """
    return {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": f"default-src 'none'; script-src 'self'; style-src {styles}; img-src {images}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
    }


def read_text(name: str) -> str:
    """Return the text of a file of the folder `pages`."""
    return _PACKAGE.joinpath("pages", name).read_text("utf-8")


class Asset(Struct, frozen=True):
    """The content of a path, made when it is first requested."""

    make: Callable[[], bytes]
    media_type: str
    headers: Mapping[str, str]

    def respond(self, request: Request[Any, Any, Any]) -> Response[Any]:
        """Return the content, or a redirect of a path that ends in slashes: its relative addresses would be wrong."""
        path: bytes = request.scope["raw_path"]
        if slashes := len(path) - len(path.rstrip(b"/")):
            return Redirect("../" * slashes + path.rstrip(b"/").rpartition(b"/")[2].decode())
        return Response(self.make(), media_type=self.media_type, headers=dict(self.headers))


def page_asset(render: Callable[[], bytes], headers: Mapping[str, str] | None = None) -> Asset:
    return Asset(cache(render), MediaType.HTML, headers or page_headers())


def file_asset(name: str) -> Asset:
    """Return a file of the package."""
    media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
    return Asset(cache(_PACKAGE.joinpath(name).read_bytes), media_type, page_headers())


def asset_routes(path: str, page: Asset, others: Mapping[str, Asset]) -> Sequence[HTTPRouteHandler]:
    """Return a route for a page, and one for all others below it, by their names."""

    # In threads, since the first request for each renders it.
    @get(path, include_in_schema=False, name=path, sync_to_thread=True)
    def serve_page(request: Request[Any, Any, Any]) -> Response[Any]:
        return page.respond(request)

    @get(f"{path}/{{name:str}}", include_in_schema=False, name=f"{path}/", sync_to_thread=True)
    def serve_asset(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[Any]:
        if name not in others:
            raise NotFound("Nothing exists at this path.")
        return others[name].respond(request)

    return [serve_page, serve_asset]


def frame_assets() -> Mapping[str, Asset]:
    """Return what every page loads from `docs`."""
    return {name: file_asset(f"pages/{name}") for name in _FRAME_FILES}


def render_page(title: str, content: str, *, path: str, links: Sequence[Link]) -> bytes:
    """Return a page. Its addresses are relative, since a proxy may serve the gateway below a path."""
    root = root_of(path)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · Imaging Gateway</title>
<link rel="icon" href="{root}docs/icon.svg">
<link rel="stylesheet" href="{root}docs/style.css">
<script type="module" src="{root}docs/page.js"></script>
<a class="skip" href="#content">Skip to the content</a>
<nav class="bar" aria-label="Site">
<a class="brand" href="{root}docs"><img src="{root}docs/icon.svg" alt="" width="24" height="24">Imaging Gateway</a>
<ul>{render_links(links, path=path)}</ul>
</nav>
{content}
</html>
""".encode()


def root_of(path: str) -> str:
    """Return the relative address of the gateway's root from the page at `path`."""
    return "../" * path.count("/")


def render_links(links: Sequence[Link], *, path: str, inner: str = "") -> str:
    """Return a list of links for the page at `path`, whose own entry is followed by `inner`."""
    return "".join(
        f'<li><a href="{root_of(path)}{link.path}" aria-current="page">{escape(link.label)}</a>{inner}'
        if link.path == path
        else f'<li><a href="{root_of(path)}{link.path}">{escape(link.label)}</a>'
        for link in links
    )


class Section(Struct, frozen=True):
    """A heading of the second level, with the fragment that leads to it."""

    fragment: str
    title: str


def render_markdown(text: str) -> tuple[str, list[Section]]:
    """Return the HTML of a text and its sections."""
    from markdown_it import MarkdownIt  # noqa: PLC0415 - slow to import, and only pages need it

    parser = MarkdownIt("commonmark", {"html": False, "highlight": _highlight}).enable("table")
    tokens, sections = parser.parse(text), []
    for heading, content in pairwise(tokens):
        if heading.type == "heading_open" and heading.tag == "h2":
            section = Section(_to_fragment(content.content), content.content.replace("`", ""))
            heading.attrSet("id", section.fragment)
            sections.append(section)
    html: str = parser.renderer.render(tokens, parser.options, {})
    # Wide tables scroll, also by the keyboard.
    html = html.replace("<table>", '<div class="scroll" tabindex="0" role="group" aria-label="Table"><table>')
    return html.replace("</table>", "</table></div>"), sections


def fill(text: str, facts: Mapping[str, str]) -> str:
    """Replace each `{{name}}` by that fact. Raises KeyError for an unknown one."""
    return _PLACEHOLDER.sub(lambda found: facts[found[1]], text)


def _to_fragment(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _highlight(code: str, language: str, _attributes: str) -> str:
    from pygments import formatters, highlight, lexers, util  # noqa: PLC0415 - as above

    try:
        html = highlight(code, lexers.get_lexer_by_name(language), formatters.HtmlFormatter(nowrap=True))
    except util.ClassNotFound:
        html = escape(code)
    return f'<pre tabindex="0"><code class="language-{escape(language)}">{html}</code></pre>\n'
