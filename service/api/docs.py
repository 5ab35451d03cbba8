"""Routes for the documentation: `/docs` and its parts, `/openapi.json`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec
from litestar import MediaType, Request, Response, get
from litestar.handlers import HTTPRouteHandler

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
    "X-Content-Type-Options": "nosniff",
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


def docs_routes() -> Sequence[HTTPRouteHandler]:
    """Return the routes, which document the application that contains them."""

    @cache  # built by the first request for it
    def encode_document(app: Any) -> bytes:
        return msgspec.json.encode(build_document(app))

    @get("/openapi.json", include_in_schema=False)
    async def openapi_document(request: Request[Any, Any, Any]) -> Response[bytes]:
        return Response(encode_document(request.app), media_type=MediaType.JSON, headers={"Cache-Control": "no-cache"})

    @get("/docs", include_in_schema=False)
    async def page() -> Response[str]:
        return Response(_PAGE, media_type=MediaType.HTML, headers=_HEADERS)

    @get("/docs/setup.js", include_in_schema=False)
    async def setup_script() -> Response[bytes]:
        return Response(_read_file("docs_setup.js"), media_type="text/javascript", headers=_HEADERS)

    @get(f"/docs/{_VIEWER}", include_in_schema=False)
    async def viewer() -> Response[bytes]:
        headers = {**_HEADERS, "Cache-Control": "public, max-age=31536000, immutable", "Content-Encoding": "gzip"}
        content = _read_file(f"vendor/{_VIEWER}.gz")
        return Response(content, media_type="text/javascript", headers=headers)

    return [openapi_document, page, setup_script, viewer]


@cache
def _read_file(name: str) -> bytes:
    return files(__package__).joinpath(name).read_bytes()
