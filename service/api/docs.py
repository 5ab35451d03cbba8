"""Routes for the documentation: `/docs` and its parts, the page of problems, `/openapi.json`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

import msgspec
from litestar import MediaType, Request, Response, get
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from service.api.errors import PROBLEMS, ProblemType
from service.api.openapi_document import build_document
from service.api.pages import (
    Asset,
    Link,
    asset_routes,
    file_asset,
    frame_assets,
    page_asset,
    page_headers,
    read_text,
    render_markdown,
    render_page,
)

_VIEWER = "scalar-1.76.0.js"
_VIEWER_INTEGRITY = "sha256-3LAnFSvyC/L23NZuj5+wc8Gp4nTPC5S5OafZmriUcGA="
"""The vendored viewer: `make docs-viewer` fetches another version."""
# The viewer sets style attributes. It shows results as images under blob URLs, and has icons under data URLs.
_VIEWER_HEADERS = page_headers(images="'self' blob: data:", styles="'self' 'unsafe-inline'")
_GUIDE_LINK = re.compile(r"\[([^\]]+)\]\(([\w-]+)\)")
_SECTION = re.compile(r"^## (\S+)\n", re.MULTILINE)


class Site(Struct, frozen=True):
    """The pages of a port: `links` lead to them; `introduction` is shown above the viewer and leads to the guides."""

    links: Sequence[Link]
    introduction: str = ""
    guides: Mapping[str, Asset] = {}


def docs_routes(site: Site) -> Sequence[HTTPRouteHandler]:
    """Return the routes, which document the application that contains them."""

    def render_docs() -> bytes:
        content = f"""<div id="content">
{site.introduction}
<div id="viewer"></div>
<noscript>Without JavaScript: <a href="openapi.json">the OpenAPI document</a>.</noscript>
</div>
<script src="docs/setup.js"></script>
<script src="docs/{_VIEWER}" integrity="{_VIEWER_INTEGRITY}"></script>"""
        return render_page("Documentation", content, path="docs", links=site.links)

    def render_problems() -> bytes:
        content = _render_problems(site.guides)
        return render_page("Problems", content, path="docs/problems", links=site.links)

    @cache  # built by the first request for it
    def encode_document(app: Any) -> bytes:
        return msgspec.json.encode(build_document(app))

    @get("/openapi.json", include_in_schema=False)
    async def openapi_document(request: Request[Any, Any, Any]) -> Response[bytes]:
        return Response(encode_document(request.app), media_type=MediaType.JSON, headers={"Cache-Control": "no-cache"})

    @get(f"/docs/{_VIEWER}", include_in_schema=False)
    async def viewer() -> Response[bytes]:
        headers = {**page_headers(), "Cache-Control": "public, max-age=31536000, immutable", "Content-Encoding": "gzip"}
        return Response(_read_viewer(), media_type="text/javascript", headers=headers)

    page = page_asset(render_docs, _VIEWER_HEADERS)
    own = {"setup.js": file_asset("api/docs_setup.js"), "problems": page_asset(render_problems)}
    return [openapi_document, viewer, *asset_routes("/docs", page, {**frame_assets(), **own, **site.guides})]


@cache
def _read_viewer() -> bytes:
    return files(__package__).joinpath(f"vendor/{_VIEWER}.gz").read_bytes()


def _render_problems(guides: Collection[str]) -> str:
    """Return the page about all problems: for each its row of the table of errors, and advice from `problems.md`.

    Links to guides that are not of this port are removed.
    """
    text = _GUIDE_LINK.sub(lambda link: link[0] if link[2] in guides else link[1], read_text("problems.md"))
    title, *sections = _SECTION.split(text)
    advice = dict(zip(sections[::2], sections[1::2], strict=True))
    heading, introduction = title.split("\n", 1)
    entries = "".join(_render_problem(problem, advice[problem.code]) for problem in PROBLEMS)
    index = "".join(
        f'<li><a href="#{problem.code}">{problem.status} {escape(problem.code)}</a>' for problem in PROBLEMS
    )
    return (
        f'<div class="columns"><main id="content"><h1>{escape(heading.removeprefix("# "))}</h1>\n'
        f"{render_markdown(introduction)[0]}{entries}</main>\n"
        f'<nav class="side" aria-label="Problems"><h2>Problems</h2><ul>{index}</ul></nav></div>'
    )


def _render_problem(problem: ProblemType, advice: str) -> str:
    return (
        f'<section class="problem" id="{problem.code}"><h2><code>{problem.code}</code></h2>\n'
        f'<p class="facts"><span class="badge s{problem.status // 100}">{problem.status}</span> '
        f"{escape(problem.title)}</p>\n{render_markdown(problem.description)[0]}{render_markdown(advice)[0]}</section>\n"
    )
