"""Routes of the playground, a page that submits a picture and shows the result: `/playground` and its files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from litestar import MediaType, Request, Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.response import Redirect

from service.api.pages import Link, file_route, page_headers, read_text, render_page

PATH = "playground"
_FILES = (
    "style.css",
    *(f"{name}.js" for name in ("main", "account", "api", "code", "dom", "options", "result", "schema")),
)
_SAMPLES = ("photo.jpg", "logo.png", "face.jpg", "texture.jpg")


def playground_routes(links: Sequence[Link]) -> Sequence[HTTPRouteHandler]:
    """Return the routes. The page calls the API as any other client, with the token that is pasted into it."""

    @cache
    def render() -> bytes:
        return render_page("Playground", read_text("playground/index.html"), path=PATH, links=links)

    @get(f"/{PATH}", include_in_schema=False)
    async def playground(request: Request[Any, Any, Any]) -> Response[Any]:
        path: bytes = request.scope["raw_path"]
        if slashes := len(path) - len(path.rstrip(b"/")):  # its relative addresses would lead nowhere
            return Redirect("../" * slashes + PATH)
        # Pictures and results are shown as images under blob URLs, where an SVG can't run scripts.
        return Response(render(), media_type=MediaType.HTML, headers=page_headers(images="'self' blob:"))

    files = [file_route(f"/{PATH}/{name}", f"pages/playground/{name}") for name in _FILES]
    samples = [file_route(f"/{PATH}/{name}", f"demo/images/{name}") for name in _SAMPLES]
    return [playground, *files, *samples]
