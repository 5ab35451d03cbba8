"""Images as arrays of OpenCV: rows of blue, green, red and, where there is transparency, alpha, in 8 bits each."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
from cv2.typing import MatLike
from PIL import Image, ImageOps

from service.sandbox.forms import RejectedError
from service.sandbox.imaging.intake import FORMATS, MOST_PIXELS


def load(path: Path) -> MatLike:
    """Decode an image, upright as its camera meant it.

    Raises:
        RejectedError: it is broken.

    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                # Pillow would clip what is above 255 to white.
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            clear = upright.has_transparency_data
            pixels = np.asarray(upright.convert("RGBA" if clear else "RGB"))
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise RejectedError("图片文件已损坏") from error
    return cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA if clear else cv2.COLOR_RGB2BGR)


def save(picture: MatLike, path: Path) -> Path:
    """Write an image in the format that the path's suffix names, and give the path back.

    Raises:
        OSError: it can't be written.

    """
    written, data = cv2.imencode(path.suffix, picture)
    if not written:
        raise OSError(f"{path.name} could not be encoded")
    path.write_bytes(data.tobytes())
    return path


def split_alpha(picture: MatLike) -> tuple[MatLike, MatLike | None]:
    """Give the colours and, where there is transparency, the alpha."""
    if picture.shape[2] == 3:
        return picture, None
    return np.ascontiguousarray(picture[:, :, :3]), np.ascontiguousarray(picture[:, :, 3])


def join_alpha(colours: MatLike, alpha: MatLike | None) -> MatLike:
    """Put back together what `split_alpha` took apart."""
    return colours if alpha is None else np.dstack((colours, alpha))


def shrink(picture: MatLike, most_pixels: int) -> MatLike:
    """Give the image with at most so many pixels, and at least one in each direction."""
    height, width = picture.shape[:2]
    if height * width <= most_pixels:
        return picture
    factor = math.sqrt(most_pixels / (height * width))
    size = max(1, int(width * factor)), max(1, int(height * factor))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def sharpen(colours: MatLike, radius: float, amount: float) -> MatLike:
    """Sharpen with an unsharp mask.

    Args:
        colours: the image.
        radius: of the blur that is taken away, in pixels.
        amount: how much of the difference to the blur is added.

    """
    blurred = cv2.GaussianBlur(colours, (0, 0), radius)
    return cv2.addWeighted(colours, 1 + amount, blurred, -amount, 0)


def lift_contrast(colours: MatLike, limit: float) -> MatLike:
    """Even out the light, locally (CLAHE on the lightness alone, so that colours stay)."""
    lab = cv2.cvtColor(colours, cv2.COLOR_BGR2LAB)
    lab[:, :, 0] = cv2.createCLAHE(limit, (8, 8)).apply(lab[:, :, 0])
    return cv2.cvtColor(lab, cv2.COLOR_LAB2BGR)


def bounded(width: float, height: float) -> tuple[int, int]:
    """Round a size that is to be made.

    Raises:
        RejectedError: it has more pixels than can be worked on.

    """
    if width * height > MOST_PIXELS:
        raise RejectedError(f"放大后的图片像素过大(最多{MOST_PIXELS // 1_000_000}百万像素)")
    return max(1, round(width)), max(1, round(height))
