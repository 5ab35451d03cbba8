"""Small images to submit."""

from __future__ import annotations

import struct
import zlib
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


def png_claiming_size(width: int, height: int) -> bytes:
    """Return a small file whose header declares this size."""
    content = make_png()
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
