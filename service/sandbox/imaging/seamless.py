"""Seamless tiling: an image whose opposite edges continue each other."""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
from cv2.typing import MatLike

from service.sandbox.imaging import picture

_MOST_GRID_PIXELS: Final = 16_000_000


def make_seamless(image: MatLike, fit: float) -> MatLike:
    """Give a tile of the same size.

    Towards each edge the image fades into itself shifted by half its size, in which the edge is the middle and so has
    no seam; the shifted one's own seam lies where nothing of it is left.

    Args:
        image: to be made into a tile.
        fit: share of the half image that fades: more hides the seam better and loses more of the image.

    """
    return _blend(_blend(image, fit, axis=1), fit, axis=0)


def grid(tile: MatLike) -> MatLike:
    """Lay the tile out two by two, smaller if the whole would grow too large."""
    small = picture.shrink(tile, _MOST_GRID_PIXELS // 4)
    return np.tile(small, (2, 2, 1))


def _blend(image: MatLike, fit: float, *, axis: int) -> MatLike:
    length = image.shape[axis]
    shifted = np.roll(image, length // 2, axis=axis)
    from_edge = np.minimum(np.arange(length), np.arange(length)[::-1])
    progress = np.clip(from_edge / max(1.0, fit * (length // 2 - 1)), 0, 1)
    # Smoothstep: the fade has no visible beginning.
    kept = (progress * progress * (3 - 2 * progress)).astype(np.float32)
    weights = np.broadcast_to(kept if axis == 1 else kept[:, np.newaxis], image.shape[:2])
    keep = np.ascontiguousarray(weights)
    return cv2.blendLinear(image, shifted, keep, 1 - keep)
