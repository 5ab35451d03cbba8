"""Face restoration: finds the faces and works on them alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from cv2.typing import MatLike, Rect

from service.sandbox.imaging import picture

_CASCADE: Final = Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_default.xml"
_DETECTION_PIXELS: Final = 640_000
_MARGIN: Final = 0.25


def enhance_faces(image: MatLike) -> MatLike:
    """Give the image with its faces cleaned and sharpened; one without a face is treated gently as a whole."""
    colours, alpha = picture.split_alpha(image)
    faces = find_faces(colours)
    if not faces:
        return picture.join_alpha(picture.sharpen(cv2.bilateralFilter(colours, 5, 15, 3), 1.2, 0.4), alpha)
    restored = colours.copy()
    for face in faces:
        _restore(restored, face)
    return picture.join_alpha(restored, alpha)


def find_faces(colours: MatLike) -> list[Rect]:
    """Give the faces as left, top, width, height."""
    small = picture.shrink(colours, _DETECTION_PIXELS)
    grey = cv2.equalizeHist(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY))
    # A classifier keeps state while it runs, so that each thread needs its own.
    cascade = cv2.CascadeClassifier(str(_CASCADE))
    found = cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=5, minSize=(32, 32))
    factor = math.sqrt(colours.shape[0] * colours.shape[1] / (small.shape[0] * small.shape[1]))
    return [tuple(round(factor * int(length)) for length in face) for face in found]


def _restore(colours: MatLike, face: Rect) -> None:
    """Restore one face in place, fading into what surrounds it."""
    left, top, width, height = face
    rows = slice(max(0, top - round(_MARGIN * height)), top + round((1 + _MARGIN) * height))
    columns = slice(max(0, left - round(_MARGIN * width)), left + round((1 + _MARGIN) * width))
    region = colours[rows, columns]
    clean = cv2.bilateralFilter(region, 9, 40, 4)
    # Half of it: all of it would draw a halo around dark hair.
    lit = cv2.addWeighted(picture.lift_contrast(clean, 1.3), 0.5, clean, 0.5, 0)
    better = picture.sharpen(lit, max(1.0, width / 160), 0.7)
    inside = _feathered(region.shape[0], region.shape[1])
    colours[rows, columns] = cv2.blendLinear(better, np.ascontiguousarray(region), inside, 1 - inside)


def _feathered(height: int, width: int) -> MatLike:
    """Give the weights of an ellipse that reaches the middle of each side and fades out before it."""
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, np.newaxis]
    across = np.linspace(-1, 1, width, dtype=np.float32)[np.newaxis, :]
    distance = np.sqrt(down * down + across * across)
    return np.clip((1 - distance) / 0.35, 0, 1).astype(np.float32)
