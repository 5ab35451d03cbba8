"""Valid results of every kind, made from the demo's images."""

import io
from functools import cache

from PIL import Image, ImageFilter

from service.demo.run import JOBS

SVG = (
    b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="320" height="320">'
    b'<path d="M0 0L9 9Z"/><path d="M5 5L9 0Z"/></svg>'
)

Body = tuple[str, bytes]


def good_results() -> dict[str, dict[str, Body]]:
    """Return results by kind and name, for the caller to change."""
    return {kind: dict(results) for kind, results in _make_results().items()}


@cache
def _make_results() -> dict[str, dict[str, Body]]:
    images = {job.kind: Image.open(io.BytesIO(job.read_image())).convert("RGB") for job in JOBS}
    photo, texture = images["upscale"], images["seamless"]
    tile = tile_mirrored(texture.resize((128, 128)))
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
