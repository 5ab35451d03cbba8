"""Routes for the documentation: `/docs` and its parts, `/openapi.json`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files
from re import sub
from typing import Any

import msgspec
from litestar import MediaType, Request, Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.response import Redirect

from service.api.errors import PROBLEMS, ProblemType
from service.api.openapi_document import build_document

_VIEWER = "scalar-1.76.0.js"
_VIEWER_INTEGRITY = "sha256-3LAnFSvyC/L23NZuj5+wc8Gp4nTPC5S5OafZmriUcGA="
"""The vendored viewer: `make docs-viewer` fetches another version."""
_HEADERS = {
    "Cache-Control": "no-cache",
    # The viewer sets style attributes. It shows results as images under blob URLs, and has icons under data URLs.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
# Addresses are relative, since a proxy may serve the gateway below a path.
_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
"""
_PAGE = f"""{_HEAD}<title>Imaging Gateway</title>
<div id="viewer"></div>
<noscript>Without JavaScript: <a href="openapi.json">the OpenAPI document</a>.</noscript>
<script src="docs/setup.js"></script>
<script src="docs/{_VIEWER}" integrity="{_VIEWER_INTEGRITY}"></script>
</html>
"""
_PROBLEMS_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse }
td { padding: .5rem 1rem .5rem 0; vertical-align: top }
:target { background: Mark; color: MarkText }
"""


def docs_routes() -> Sequence[HTTPRouteHandler]:
    """Return the routes, which document the application that contains them."""

    @cache  # built by the first request for it
    def encode_document(app: Any) -> bytes:
        return msgspec.json.encode(build_document(app))

    @get("/openapi.json", include_in_schema=False)
    async def openapi_document(request: Request[Any, Any, Any]) -> Response[bytes]:
        return Response(encode_document(request.app), media_type=MediaType.JSON, headers={"Cache-Control": "no-cache"})

    @get("/docs", include_in_schema=False)
    async def page(request: Request[Any, Any, Any]) -> Response[Any]:
        path: bytes = request.scope["raw_path"]
        if slashes := len(path) - len(path.rstrip(b"/")):  # its relative addresses would lead nowhere
            return Redirect("../" * slashes + "docs")
        return Response(_PAGE, media_type=MediaType.HTML, headers=_HEADERS)

    @get("/docs/setup.js", include_in_schema=False)
    async def setup_script() -> Response[bytes]:
        return Response(_read_file("docs_setup.js"), media_type="text/javascript", headers=_HEADERS)

    @get(f"/docs/{_VIEWER}", include_in_schema=False)
    async def viewer() -> Response[bytes]:
        headers = {**_HEADERS, "Cache-Control": "public, max-age=31536000, immutable", "Content-Encoding": "gzip"}
        content = _read_file(f"vendor/{_VIEWER}.gz")
        return Response(content, media_type="text/javascript", headers=headers)

    @get("/docs/problems", include_in_schema=False)
    async def problems() -> Response[str]:
        return Response(_render_problems(), media_type=MediaType.HTML, headers=_HEADERS)

    return [openapi_document, page, setup_script, viewer, problems]


@cache
def _read_file(name: str) -> bytes:
    return files(__package__).joinpath(name).read_bytes()


@cache
def _render_problems() -> str:
    rows = "".join(map(_render_row, PROBLEMS))
    return (
        f"{_HEAD}<title>Problems</title>\n<style>{_PROBLEMS_STYLE}</style>\n<h1>Problems</h1>\n"
        "<p>The <code>code</code> of a problem is stable. Its <code>detail</code> explains what to do.\n"
        f"<table>\n{rows}</table>\n</html>\n"
    )


def _render_row(problem: ProblemType) -> str:
    code, title = escape(problem.code), escape(problem.title)
    description = sub(r"`([^`]+)`", r"<code>\1</code>", escape(problem.description))
    return f'<tr id="{code}"><td>{problem.status}<td><code>{code}</code><td><b>{title}</b><br>{description}\n'
