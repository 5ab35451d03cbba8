"""Routes of the playground, a page that submits a picture and shows the result: `/playground` and its files."""

from __future__ import annotations

from collections.abc import Sequence

from litestar.handlers import HTTPRouteHandler

from service.api.pages import Link, asset_routes, file_asset, page_asset, page_headers, read_text, render_page

PATH = "playground"
_MODULES = ("main", "account", "api", "code", "dom", "options", "result", "schema")
_SAMPLES = ("photo.jpg", "logo.png", "face.jpg", "texture.jpg")


def playground_routes(links: Sequence[Link]) -> Sequence[HTTPRouteHandler]:
    """Return the routes. The page calls the API as any other client, with the token that is pasted into it."""

    def render() -> bytes:
        return render_page("Playground", read_text("playground/index.html"), path=PATH, links=links)

    # Pictures and results are shown as images under blob URLs, where an SVG can't run scripts.
    page = page_asset(render, page_headers(images="'self' blob:"))
    files = {name: file_asset(f"pages/playground/{name}") for name in ("style.css", *(f"{m}.js" for m in _MODULES))}
    samples = {name: file_asset(f"demo/images/{name}") for name in _SAMPLES}
    return asset_routes(f"/{PATH}", page, files | samples)
