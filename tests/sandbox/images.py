"""Images drawn for the tests, each suited to its kind of task."""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
from cv2.typing import MatLike

RED, WHITE, BLUE = (200, 30, 40), (255, 255, 255), (20, 60, 180)


def encode_image(image: MatLike, suffix: str = ".png") -> bytes:
    return bytes(cv2.imencode(suffix, image)[1])


def plain_png(width: int = 64, height: int = 48) -> bytes:
    return encode_image(np.full((height, width, 3), RED[::-1], np.uint8))


def png_claiming_size(width: int, height: int) -> bytes:
    """Return a small file whose header declares this size."""
    content = plain_png()
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def draw_logo() -> MatLike:
    """Draw three flat colours: a disc and a bar on white."""
    image = np.full((240, 320, 3), WHITE, np.uint8)
    cv2.circle(image, (110, 120), 80, RED[::-1], -1, cv2.LINE_AA)
    cv2.rectangle(image, (200, 60), (290, 180), BLUE[::-1], -1)
    return image


def draw_scene(height: int = 240, width: int = 320) -> MatLike:
    """Draw a colour gradient with soft texture, whose opposite edges differ."""
    random = np.random.default_rng(3)
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    slope = np.dstack((255 * across, 120 + 100 * down, 255 * (1 - across)))
    texture = cv2.GaussianBlur(random.normal(0, 60, (height, width, 1)).astype(np.float32), (0, 0), 2)
    return np.clip(slope + 3 * texture[:, :, np.newaxis], 0, 255).astype(np.uint8)


def draw_face() -> MatLike:
    """Draw a face in even light on a plain wall, with grain."""
    image = np.full((360, 360, 3), (150, 140, 120), np.uint8)
    shapes = [((180, 190), (88, 118), (150, 180, 225)), ((180, 264), (34, 11), (80, 75, 160))]
    for x in (145, 215):
        eyebrow, eye = ((x, 150), (26, 7), (50, 60, 85)), ((x, 172), (24, 15), (95, 120, 165))
        shapes += [eyebrow, eye, ((x, 172), (8, 8), (40, 40, 45))]
    for centre, axes, colour in shapes:
        cv2.ellipse(image, centre, axes, 0, 0, 360, colour, -1, cv2.LINE_AA)
    grain = np.random.default_rng(1).normal(0, 5, image.shape)
    return np.clip(cv2.GaussianBlur(image, (0, 0), 2.5) + grain, 0, 255).astype(np.uint8)
