"""A scripted gateway for the demo, and valid results of every kind."""

import io
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from PIL import Image, ImageFilter

from service.demo.run import JOBS
from tests.support.network import serve_app

TOKEN = "gw_demo"
SVG = (
    b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="320" height="320">'
    b'<path d="M0 0L9 9Z"/><path d="M5 5L9 0Z"/></svg>'
)
Body = tuple[str, bytes]


def good_results() -> dict[str, dict[str, Body]]:
    """Return content types and bodies by kind and name, for the caller to change."""
    return {kind: dict(results) for kind, results in _make_results().items()}


@cache
def _make_results() -> dict[str, dict[str, Body]]:
    images = {job.kind: Image.open(io.BytesIO(job.read_image())).convert("RGB") for job in JOBS}
    photo = images["upscale"]
    tile = tile_mirrored(images["seamless"].resize((128, 128)))
    return {
        "upscale": {"image": encode_image(photo.resize((photo.width * 2, photo.height * 2)), "PNG")},
        "vectorize": {"vector": ("image/svg+xml; charset=utf-8", SVG)},
        "face-enhance": {"image": encode_image(images["face-enhance"].filter(ImageFilter.MedianFilter(3)), "JPEG")},
        "seamless": {"image": encode_image(tile, "PNG"), "grid": encode_image(tile_mirrored(tile), "WEBP")},
    }


def tile_mirrored(image: Image.Image) -> Image.Image:
    """Tile the image with its reflections, so that opposite edges match."""
    tiled = Image.new(image.mode, (image.width * 2, image.height * 2))
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for x, part in ((0, image), (image.width, flipped)):
        tiled.paste(part, (x, 0))
        tiled.paste(part.transpose(Image.Transpose.FLIP_TOP_BOTTOM), (x, image.height))
    return tiled


def encode_image(image: Image.Image, form: str) -> Body:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return f"image/{form.lower()}", buffer.getvalue()


@dataclass
class ScriptedGateway:
    """An ASGI app with a task for each kind: `/v1/tasks/task_KIND`."""

    url: str = ""
    states: dict[str, list[str]] = field(
        default_factory=lambda: defaultdict(lambda: ["queued", "running", "succeeded"])
    )
    """The states returned by successive reads, beginning with the submission; the last one repeats."""
    results: dict[str, dict[str, Body]] = field(default_factory=good_results)
    replies: dict[str, tuple[int, object]] = field(default_factory=dict)
    """Status and document in place of the ordinary response, by the end of the path."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of every task."""
    costs: dict[str, Any] = field(default_factory=dict)
    retry_after: str | None = "0"
    paths: list[str] = field(default_factory=list)
    reads: Counter[str] = field(default_factory=Counter)
    """How often each kind was read, beginning with its submission."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert (b"authorization", f"Bearer {TOKEN}".encode()) in scope["headers"]
        while (await receive()).get("more_body"):
            pass
        path: str = scope["path"]
        self.paths.append(path)
        status, headers, body = self._respond(path.removeprefix("/v1/"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _respond(self, path: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        for end, (status, document) in self.replies.items():
            if path.endswith(end):
                return status, [], document if isinstance(document, bytes) else json.dumps(document).encode()
        match path.split("/"):
            case "tasks", task_id, "artifacts", name:
                content_type, body = self.results[task_id.removeprefix("task_")][name]
                return 200, [(b"content-type", content_type.encode())], body
            case "tasks", target:
                return self._read_task(target.removeprefix("task_"))
            case _:
                return 200, [], b"{}"

    def _read_task(self, kind: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        states = self.states[kind]
        state = states[min(self.reads[kind], len(states) - 1)]
        self.reads[kind] += 1
        links = [{"name": name, "href": f"/v1/tasks/task_{kind}/artifacts/{name}"} for name in self.results[kind]]
        task = {"id": f"task_{kind}", "state": state, "artifacts": links if state == "succeeded" else []}
        if state in {"succeeded", "failed"}:
            task["cost"] = self.costs.get(kind, {"count": 1, "money": 0, "basis": "observed"})
        headers = [] if self.retry_after is None else [(b"retry-after", self.retry_after.encode())]
        return 200, headers, json.dumps(task | self.fields).encode()


@pytest.fixture
async def gateway() -> AsyncIterator[ScriptedGateway]:
    gateway = ScriptedGateway()
    async with serve_app(gateway) as gateway.url:
        yield gateway


def make_problem(title: str, detail: str) -> dict[str, object]:
    return {"type": "urn:x", "title": title, "detail": detail, "code": "x"}
