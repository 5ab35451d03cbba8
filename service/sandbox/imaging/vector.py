"""Vectorisation: few colours, then paths."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from cv2.typing import MatLike

from service.sandbox.imaging import picture

_MOST_PIXELS: Final = 1_000_000
_SAMPLE: Final = 20_000
# vtracer holds the interpreter's lock while it works, so it runs in a process of its own. The colours are flat already:
# all of their bits are kept apart, and no neighbours are merged.
_TRACE_PROGRAM = """
import sys, vtracer
options = dict(color_precision=8, layer_difference=0, filter_speckle=4, path_precision=2)
vtracer.convert_image_to_svg_py(*sys.argv[1:], **options)
"""
_TRACE_SECONDS: Final = 120.0
_SEED: Final = 5
_FILL: Final = re.compile(r'fill="#([0-9A-Fa-f]{6})"')
_SIZE: Final = re.compile(r'width="(\d+)" height="(\d+)"')


def flatten(image: MatLike, color_count: int) -> MatLike:
    """Give the image in at most so many colours, each pixel opaque or clear, and no larger than can be traced."""
    colours, alpha = picture.split_alpha(picture.shrink(image, _MOST_PIXELS))
    pixels = cv2.bilateralFilter(colours, 5, 25, 3).reshape(-1, 3)
    opaque = None if alpha is None else np.where(alpha > 127, 255, 0).astype(np.uint8)
    shown = pixels if opaque is None or not opaque.any() else pixels[opaque.reshape(-1) > 0]
    flat = _nearest(pixels, _palette(shown, color_count)).reshape(colours.shape)
    return picture.join_alpha(flat, opaque)


def trace(flat: MatLike, source: Path, target: Path, size: tuple[int, int]) -> None:
    """Draw a flattened image as paths, each filled with one of its colours.

    Args:
        flat: the image.
        source: the same, as a PNG.
        target: the SVG to be written.
        size: width and height that the SVG is to have, in pixels.

    Raises:
        OSError: it could not be traced.
        subprocess.SubprocessError: likewise.

    """
    program = [sys.executable, "-c", _TRACE_PROGRAM, str(source), str(target)]
    # Nothing of it comes from a client: the paths are the sandbox's own.
    subprocess.run(program, check=True, timeout=_TRACE_SECONDS, stdout=subprocess.DEVNULL)  # noqa: S603
    palette = np.unique(flat.reshape(-1, flat.shape[2])[:, :3], axis=0)

    def to_palette(fill: re.Match[str]) -> str:
        # Where specks were swallowed, the tracer fills with a mean colour.
        red, green, blue = bytes.fromhex(fill[1])
        nearest = _nearest(np.array([[blue, green, red]], np.uint8), palette)[0]
        return 'fill="#{:02x}{:02x}{:02x}"'.format(*nearest[::-1])

    svg = _FILL.sub(to_palette, target.read_text())
    width, height = size
    svg = _SIZE.sub(rf'width="{width}" height="{height}" viewBox="0 0 \1 \2"', svg, count=1)
    target.write_text(svg)


def _palette(pixels: MatLike, color_count: int) -> MatLike:
    chosen = np.random.default_rng(_SEED).integers(0, len(pixels), min(_SAMPLE, len(pixels)))
    sample = pixels[chosen]
    distinct = np.unique(sample, axis=0)
    if len(distinct) <= color_count:
        return distinct
    cv2.setRNGSeed(_SEED)
    rule = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 30, 0.5)
    start = np.empty((0, 1), np.int32)
    _, _, centres = cv2.kmeans(sample.astype(np.float32), color_count, start, rule, 3, cv2.KMEANS_PP_CENTERS)
    return centres.round().astype(np.uint8)


def _nearest(pixels: MatLike, palette: MatLike) -> MatLike:
    """Give for each pixel the nearest colour of the palette, one colour at a time to save memory."""
    signed = pixels.astype(np.int32)
    best = np.full(len(pixels), np.iinfo(np.int32).max, np.int32)
    index = np.zeros(len(pixels), np.intp)
    for place, colour in enumerate(palette.astype(np.int32)):
        distance = np.square(signed - colour).sum(axis=1, dtype=np.int32)
        closer = distance < best
        best[closer] = distance[closer]
        index[closer] = place
    return palette[index]
