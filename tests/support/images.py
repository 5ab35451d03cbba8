"""Small images to submit."""

from __future__ import annotations

from io import BytesIO

from PIL import Image, ImageDraw


def draw_image(width: int = 24, height: int = 16) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).ellipse((2, 2, width - 3, height - 3), fill="crimson", outline="navy")
    return image


def encode_image(image: Image.Image, file_format: str, **options: bytes) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def make_png(width: int = 24, height: int = 16) -> bytes:
    return encode_image(draw_image(width, height), "PNG")
