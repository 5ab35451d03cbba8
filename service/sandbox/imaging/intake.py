"""Looks at the head of an image, without decoding it: hostile ones are turned away before they cost memory."""

from __future__ import annotations

import io
import struct
from typing import Final

from PIL import Image, UnidentifiedImageError

from service.sandbox.forms import RejectedError

FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MOST_PIXELS: Final = 25_000_000
_TOO_MANY_PIXELS: Final = f"图片像素过大(最多{MOST_PIXELS // 1_000_000}百万像素)"


def probe(image: bytes) -> None:
    """Check that this is an image of a bearable size.

    Raises:
        RejectedError: it is not.

    """
    if not image:
        raise RejectedError("图片文件为空")
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
            width, height = picture.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RejectedError(_TOO_MANY_PIXELS) from None
    # Pillow's readers let their own mishaps with broken files through.
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, struct.error, TypeError, KeyError):
        raise RejectedError("无法识别的图片格式") from None
    if width * height > MOST_PIXELS:
        raise RejectedError(_TOO_MANY_PIXELS)
