"""The four image operations, without a model.

Images are arrays of OpenCV: rows of blue, green, red and optionally alpha, in 8 bits each.
"""

from __future__ import annotations

import io
import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from cv2.typing import MatLike, Rect
from PIL import Image, ImageOps, UnidentifiedImageError

from service.sandbox.faults import Kind
from service.sandbox.forms import Options, RejectedError

FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS: Final = 25_000_000
_TOO_MANY_PIXELS_ERROR: Final = f"图片像素过大(最多{MAX_PIXELS // 1_000_000}百万像素)"


def check_image(image: bytes) -> None:
    """Check the format and the size without decoding the image. Raises RejectedError."""
    if not image:
        raise RejectedError("图片文件为空")
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as header:
            width, height = header.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RejectedError(_TOO_MANY_PIXELS_ERROR) from None
    # Pillow's readers raise any of these on broken files.
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, struct.error, TypeError, KeyError):
        raise RejectedError("无法识别的图片格式") from None
    if width * height > MAX_PIXELS:
        raise RejectedError(_TOO_MANY_PIXELS_ERROR)


def load_image(path: Path) -> MatLike:
    """Decode an image and apply its EXIF orientation. Raises RejectedError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                # Pillow would clip values above 255 to white.
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            has_alpha = upright.has_transparency_data
            pixels = np.asarray(upright.convert("RGBA" if has_alpha else "RGB"))
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise RejectedError("图片文件已损坏") from error
    return cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA if has_alpha else cv2.COLOR_RGB2BGR)


def save_image(image: MatLike, path: Path) -> Path:
    """Write an image in the format of the path's suffix, and return the path. Raises OSError."""
    if not cv2.imwrite(str(path), image):
        raise OSError(f"{path.name} could not be written")
    return path


def split_alpha(image: MatLike) -> tuple[MatLike, MatLike | None]:
    """Return the colours and the alpha channel, if any."""
    if image.shape[2] == 3:
        return image, None
    return np.ascontiguousarray(image[:, :, :3]), np.ascontiguousarray(image[:, :, 3])


def join_alpha(colours: MatLike, alpha: MatLike | None) -> MatLike:
    return colours if alpha is None else np.dstack((colours, alpha))


def shrink(image: MatLike, max_pixels: int) -> MatLike:
    height, width = image.shape[:2]
    if height * width <= max_pixels:
        return image
    factor = math.sqrt(max_pixels / (height * width))
    size = max(1, int(width * factor)), max(1, int(height * factor))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def sharpen(colours: MatLike, radius: float, amount: float) -> MatLike:
    """Apply an unsharp mask: a blur radius in pixels, and the share of the difference to add."""
    blurred = cv2.GaussianBlur(colours, (0, 0), radius)
    return cv2.addWeighted(colours, 1 + amount, blurred, -amount, 0)


def lift_contrast(colours: MatLike, limit: float) -> MatLike:
    """Equalize the contrast locally (CLAHE on the lightness, so that colours stay)."""
    lab = cv2.cvtColor(colours, cv2.COLOR_BGR2LAB)
    lab[:, :, 0] = cv2.createCLAHE(limit, (8, 8)).apply(lab[:, :, 0])
    return cv2.cvtColor(lab, cv2.COLOR_LAB2BGR)


_CASCADE_PATH: Final = Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_default.xml"
_MAX_DETECTION_PIXELS: Final = 640_000
_FACE_MARGIN: Final = 0.25


def enhance_faces(image: MatLike) -> MatLike:
    """Denoise and sharpen the faces; without a face, the whole image slightly."""
    colours, alpha = split_alpha(image)
    faces = find_faces(colours)
    if not faces:
        return join_alpha(sharpen(cv2.bilateralFilter(colours, 5, 15, 3), 1.2, 0.4), alpha)
    restored = colours.copy()
    for face in faces:
        _restore_face(restored, face)
    return join_alpha(restored, alpha)


def find_faces(colours: MatLike) -> list[Rect]:
    """Return the faces as left, top, width, height."""
    small = shrink(colours, _MAX_DETECTION_PIXELS)
    grey = cv2.equalizeHist(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY))
    # A classifier is not thread-safe.
    cascade = cv2.CascadeClassifier(str(_CASCADE_PATH))
    rectangles = cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=5, minSize=(32, 32))
    factor = math.sqrt(colours.shape[0] * colours.shape[1] / (small.shape[0] * small.shape[1]))
    return [tuple(round(factor * int(length)) for length in face) for face in rectangles]


def _restore_face(colours: MatLike, face: Rect) -> None:
    """Restore one face in place, fading into its surroundings."""
    left, top, width, height = face
    rows = slice(max(0, top - round(_FACE_MARGIN * height)), top + round((1 + _FACE_MARGIN) * height))
    columns = slice(max(0, left - round(_FACE_MARGIN * width)), left + round((1 + _FACE_MARGIN) * width))
    region = colours[rows, columns]
    clean = cv2.bilateralFilter(region, 9, 40, 4)
    # Half of the effect: all of it would draw a halo around dark hair.
    lit = cv2.addWeighted(lift_contrast(clean, 1.3), 0.5, clean, 0.5, 0)
    better = sharpen(lit, max(1.0, width / 160), 0.7)
    inside = _ellipse_weights(region.shape[0], region.shape[1])
    colours[rows, columns] = cv2.blendLinear(better, np.ascontiguousarray(region), inside, 1 - inside)


def _ellipse_weights(height: int, width: int) -> MatLike:
    """Return the weights of an ellipse inside the rectangle, fading to 0 at its border."""
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, np.newaxis]
    across = np.linspace(-1, 1, width, dtype=np.float32)[np.newaxis, :]
    distance = np.sqrt(down * down + across * across)
    return np.clip((1 - distance) / 0.35, 0, 1).astype(np.float32)


_MAX_GRID_PIXELS: Final = 16_000_000


def make_seamless(image: MatLike, fit: float) -> MatLike:
    """Return a tile of the same size.

    Towards each edge the image fades into a copy shifted by half its size, whose middle has no seam. `fit` is the
    share of the half image that fades: more hides the seam better and loses more of the image.
    """
    return _blend_edges(_blend_edges(image, fit, axis=1), fit, axis=0)


def make_grid(tile: MatLike) -> MatLike:
    """Repeat the tile two by two, within the limit of pixels."""
    small = shrink(tile, _MAX_GRID_PIXELS // 4)
    return np.tile(small, (2, 2, 1))


def _blend_edges(image: MatLike, fit: float, *, axis: int) -> MatLike:
    length = image.shape[axis]
    shifted = np.roll(image, length // 2, axis=axis)
    from_edge = np.minimum(np.arange(length), np.arange(length)[::-1])
    progress = np.clip(from_edge / max(1.0, fit * (length // 2 - 1)), 0, 1)
    # Smoothstep: the fade has no visible beginning.
    share = (progress * progress * (3 - 2 * progress)).astype(np.float32)
    weights = np.broadcast_to(share if axis == 1 else share[:, np.newaxis], image.shape[:2])
    weights = np.ascontiguousarray(weights)
    return cv2.blendLinear(image, shifted, weights, 1 - weights)


def upscale(image: MatLike, options: Options) -> MatLike:
    """Enlarge an image by `options.upscale`. Raises RejectedError if the result would be too large.

    `s_noise` smooths before the enlargement, unless `high_fidelity` is set; `steps` sharpens after it;
    `strong_inpaint` removes specks and lifts the contrast, in proportion to its intensity.
    """
    height, width = image.shape[:2]
    if width * height * options.upscale**2 > MAX_PIXELS:
        raise RejectedError(f"放大后的{_TOO_MANY_PIXELS_ERROR}")
    size = round(width * options.upscale), round(height * options.upscale)
    colours, alpha = split_alpha(image)
    if not options.high_fidelity:
        colours = cv2.bilateralFilter(colours, 5, 12 + 200 * (options.s_noise - 1), 3)
    if options.strong_inpaint:
        smooth = lift_contrast(cv2.medianBlur(colours, 3), 1.5)
        share = options.strong_inpaint_intensity
        colours = cv2.addWeighted(smooth, share, colours, 1 - share, 0)
    colours = cv2.resize(colours, size, interpolation=cv2.INTER_LANCZOS4)
    colours = sharpen(colours, 0.6 + 0.4 * options.upscale, 0.4 + (options.steps - 20) / 40)
    if alpha is not None:
        alpha = cv2.resize(alpha, size, interpolation=cv2.INTER_LINEAR)
    return join_alpha(colours, alpha)


_MAX_VECTOR_PIXELS: Final = 1_000_000
_SAMPLE_PIXELS: Final = 20_000

# vtracer holds the interpreter's lock while it works, so it runs in a process of its own. The colours are flat already:
# all of their bits are kept apart, and no neighbours are merged.
_TRACE_PROGRAM = """
import sys, vtracer
options = dict(color_precision=8, layer_difference=0, filter_speckle=4, path_precision=2)
sys.stdout.write(vtracer.convert_raw_image_to_svg(sys.stdin.buffer.read(), "png", **options))
"""
_TRACE_TIMEOUT_SECONDS: Final = 120.0
_SEED: Final = 5
_FILL_PATTERN: Final = re.compile(r'fill="#([0-9A-Fa-f]{6})"')
_SIZE_PATTERN: Final = re.compile(r'width="(\d+)" height="(\d+)"')


def vectorize(image: MatLike, color_count: int, path: Path) -> MatLike:
    """Reduce the colours, trace the result into an SVG of the image's size, and return it.

    Raises OSError and subprocess.SubprocessError.
    """
    flat = reduce_colors(image, color_count)
    traced = subprocess.run(  # noqa: S603  # the program is constant
        [sys.executable, "-c", _TRACE_PROGRAM],
        input=cv2.imencode(".png", flat)[1].tobytes(),
        stdout=subprocess.PIPE,
        check=True,
        timeout=_TRACE_TIMEOUT_SECONDS,
    )
    palette = np.unique(flat.reshape(-1, flat.shape[2])[:, :3], axis=0)

    def to_palette(fill: re.Match[str]) -> str:
        # The tracer fills areas of removed specks with a mean colour.
        red, green, blue = bytes.fromhex(fill[1])
        nearest = _nearest_colors(np.array([[blue, green, red]], np.uint8), palette)[0]
        return 'fill="#{:02x}{:02x}{:02x}"'.format(*nearest[::-1])

    svg = _FILL_PATTERN.sub(to_palette, traced.stdout.decode())
    height, width = image.shape[:2]
    svg = _SIZE_PATTERN.sub(rf'width="{width}" height="{height}" viewBox="0 0 \1 \2"', svg, count=1)
    path.write_text(svg)
    return flat


def reduce_colors(image: MatLike, color_count: int) -> MatLike:
    """Reduce the colours, make each pixel opaque or clear, and limit the size for tracing."""
    colours, alpha = split_alpha(shrink(image, _MAX_VECTOR_PIXELS))
    pixels = cv2.bilateralFilter(colours, 5, 25, 3).reshape(-1, 3)
    opaque = None if alpha is None else np.where(alpha > 127, 255, 0).astype(np.uint8)
    visible = pixels if opaque is None or not opaque.any() else pixels[opaque.reshape(-1) > 0]
    flat = _nearest_colors(pixels, _choose_palette(visible, color_count)).reshape(colours.shape)
    return join_alpha(flat, opaque)


def _choose_palette(pixels: MatLike, color_count: int) -> MatLike:
    indexes = np.random.default_rng(_SEED).integers(0, len(pixels), min(_SAMPLE_PIXELS, len(pixels)))
    sample = pixels[indexes]
    distinct = np.unique(sample, axis=0)
    if len(distinct) <= color_count:
        return distinct
    cv2.setRNGSeed(_SEED)
    rule = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 30, 0.5)
    start = np.empty((0, 1), np.int32)
    _, _, centres = cv2.kmeans(sample.astype(np.float32), color_count, start, rule, 3, cv2.KMEANS_PP_CENTERS)
    return centres.round().astype(np.uint8)


def _nearest_colors(pixels: MatLike, palette: MatLike) -> MatLike:
    """Return the nearest colour of the palette for each pixel."""
    signed = pixels.astype(np.int32)
    distances = [np.square(signed - colour).sum(axis=1, dtype=np.int32) for colour in palette.astype(np.int32)]
    nearest: MatLike = palette[np.argmin(distances, axis=0)]
    return nearest


def apply_operation(kind: Kind, options: Options, image: Path, folder: Path) -> list[Path]:
    """Process a task and return the files of its results, all in the folder. Raises RejectedError and OSError."""
    source = load_image(image)
    image_path, vector_path, grid_path = folder / "image.png", folder / "vector.svg", folder / "grid.png"
    if kind == "vector":
        flat = vectorize(source, options.color_count, vector_path)
        return [save_image(flat, image_path), vector_path]
    if kind == "face":
        return [save_image(enhance_faces(source), image_path)]
    if kind == "seamless":
        tile = make_seamless(source, options.fit)
        return [save_image(tile, image_path), save_image(make_grid(tile), grid_path)]
    enlarged = upscale(source, options)
    results = [save_image(enlarged, image_path)]
    if options.vector_switch:
        vectorize(enlarged, options.color_count, vector_path)
        results.append(vector_path)
    return results
