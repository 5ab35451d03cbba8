"""The four image operations."""

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
        raise RejectedError(_TOO_MANY_PIXELS_ERROR) from None
    # Pillow's readers let their own mishaps with broken files through.
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, struct.error, TypeError, KeyError):
        raise RejectedError("无法识别的图片格式") from None
    if width * height > MAX_PIXELS:
        raise RejectedError(_TOO_MANY_PIXELS_ERROR)


def load_image(path: Path) -> MatLike:
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


def save_image(picture: MatLike, path: Path) -> Path:
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


def check_size(width: float, height: float) -> tuple[int, int]:
    """Round a size that is to be made.

    Raises:
        RejectedError: it has more pixels than can be worked on.

    """
    if width * height > MAX_PIXELS:
        raise RejectedError(f"放大后的图片像素过大(最多{MAX_PIXELS // 1_000_000}百万像素)")
    return max(1, round(width)), max(1, round(height))


_CASCADE_PATH: Final = Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_default.xml"
_MAX_DETECTION_PIXELS: Final = 640_000
_FACE_MARGIN: Final = 0.25


def enhance_faces(image: MatLike) -> MatLike:
    """Give the image with its faces cleaned and sharpened; one without a face is treated gently as a whole."""
    colours, alpha = split_alpha(image)
    faces = find_faces(colours)
    if not faces:
        return join_alpha(sharpen(cv2.bilateralFilter(colours, 5, 15, 3), 1.2, 0.4), alpha)
    restored = colours.copy()
    for face in faces:
        _restore_face(restored, face)
    return join_alpha(restored, alpha)


def find_faces(colours: MatLike) -> list[Rect]:
    """Give the faces as left, top, width, height."""
    small = shrink(colours, _MAX_DETECTION_PIXELS)
    grey = cv2.equalizeHist(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY))
    # A classifier keeps state while it runs, so that each thread needs its own.
    cascade = cv2.CascadeClassifier(str(_CASCADE_PATH))
    found = cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=5, minSize=(32, 32))
    factor = math.sqrt(colours.shape[0] * colours.shape[1] / (small.shape[0] * small.shape[1]))
    return [tuple(round(factor * int(length)) for length in face) for face in found]


def _restore_face(colours: MatLike, face: Rect) -> None:
    """Restore one face in place, fading into what surrounds it."""
    left, top, width, height = face
    rows = slice(max(0, top - round(_FACE_MARGIN * height)), top + round((1 + _FACE_MARGIN) * height))
    columns = slice(max(0, left - round(_FACE_MARGIN * width)), left + round((1 + _FACE_MARGIN) * width))
    region = colours[rows, columns]
    clean = cv2.bilateralFilter(region, 9, 40, 4)
    # Half of it: all of it would draw a halo around dark hair.
    lit = cv2.addWeighted(lift_contrast(clean, 1.3), 0.5, clean, 0.5, 0)
    better = sharpen(lit, max(1.0, width / 160), 0.7)
    inside = _ellipse_weights(region.shape[0], region.shape[1])
    colours[rows, columns] = cv2.blendLinear(better, np.ascontiguousarray(region), inside, 1 - inside)


def _ellipse_weights(height: int, width: int) -> MatLike:
    """Give the weights of an ellipse that reaches the middle of each side and fades out before it."""
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, np.newaxis]
    across = np.linspace(-1, 1, width, dtype=np.float32)[np.newaxis, :]
    distance = np.sqrt(down * down + across * across)
    return np.clip((1 - distance) / 0.35, 0, 1).astype(np.float32)


_MAX_GRID_PIXELS: Final = 16_000_000


def make_seamless(image: MatLike, fit: float) -> MatLike:
    """Give a tile of the same size.

    Towards each edge the image fades into itself shifted by half its size, in which the edge is the middle and so has
    no seam; the shifted one's own seam lies where nothing of it is left.

    Args:
        image: to be made into a tile.
        fit: share of the half image that fades: more hides the seam better and loses more of the image.

    """
    return _blend_edges(_blend_edges(image, fit, axis=1), fit, axis=0)


def make_grid(tile: MatLike) -> MatLike:
    """Lay the tile out two by two, smaller if the whole would grow too large."""
    small = shrink(tile, _MAX_GRID_PIXELS // 4)
    return np.tile(small, (2, 2, 1))


def _blend_edges(image: MatLike, fit: float, *, axis: int) -> MatLike:
    length = image.shape[axis]
    shifted = np.roll(image, length // 2, axis=axis)
    from_edge = np.minimum(np.arange(length), np.arange(length)[::-1])
    progress = np.clip(from_edge / max(1.0, fit * (length // 2 - 1)), 0, 1)
    # Smoothstep: the fade has no visible beginning.
    kept = (progress * progress * (3 - 2 * progress)).astype(np.float32)
    weights = np.broadcast_to(kept if axis == 1 else kept[:, np.newaxis], image.shape[:2])
    keep = np.ascontiguousarray(weights)
    return cv2.blendLinear(image, shifted, keep, 1 - keep)


def upscale(image: MatLike, options: Options) -> MatLike:
    """Give the image enlarged by `upscale`.

    `s_noise` smooths more before the enlargement, unless `high_fidelity` leaves the source as it is; `steps` sharpens
    more behind it; `strong_inpaint` smooths wounds away and lifts what is left, as much as its intensity says.

    Raises:
        RejectedError: the result would have too many pixels.

    """
    height, width = image.shape[:2]
    size = check_size(width * options.upscale, height * options.upscale)
    colours, alpha = split_alpha(image)
    if not options.high_fidelity:
        colours = cv2.bilateralFilter(colours, 5, 12 + 200 * (options.s_noise - 1), 3)
    if options.strong_inpaint:
        mended = lift_contrast(cv2.medianBlur(colours, 3), 1.5)
        share = options.strong_inpaint_intensity
        colours = cv2.addWeighted(mended, share, colours, 1 - share, 0)
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
vtracer.convert_image_to_svg_py(*sys.argv[1:], **options)
"""
_TRACE_TIMEOUT_SECONDS: Final = 120.0
_SEED: Final = 5
_FILL_PATTERN: Final = re.compile(r'fill="#([0-9A-Fa-f]{6})"')
_SIZE_PATTERN: Final = re.compile(r'width="(\d+)" height="(\d+)"')


def reduce_colors(image: MatLike, color_count: int) -> MatLike:
    """Give the image in at most so many colours, each pixel opaque or clear, and no larger than can be traced."""
    colours, alpha = split_alpha(shrink(image, _MAX_VECTOR_PIXELS))
    pixels = cv2.bilateralFilter(colours, 5, 25, 3).reshape(-1, 3)
    opaque = None if alpha is None else np.where(alpha > 127, 255, 0).astype(np.uint8)
    shown = pixels if opaque is None or not opaque.any() else pixels[opaque.reshape(-1) > 0]
    flat = _nearest_colors(pixels, _choose_palette(shown, color_count)).reshape(colours.shape)
    return join_alpha(flat, opaque)


def trace_paths(flat: MatLike, source: Path, target: Path, size: tuple[int, int]) -> None:
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
    subprocess.run(program, check=True, timeout=_TRACE_TIMEOUT_SECONDS, stdout=subprocess.DEVNULL)  # noqa: S603
    palette = np.unique(flat.reshape(-1, flat.shape[2])[:, :3], axis=0)

    def to_palette(fill: re.Match[str]) -> str:
        # Where specks were swallowed, the tracer fills with a mean colour.
        red, green, blue = bytes.fromhex(fill[1])
        nearest = _nearest_colors(np.array([[blue, green, red]], np.uint8), palette)[0]
        return 'fill="#{:02x}{:02x}{:02x}"'.format(*nearest[::-1])

    svg = _FILL_PATTERN.sub(to_palette, target.read_text())
    width, height = size
    svg = _SIZE_PATTERN.sub(rf'width="{width}" height="{height}" viewBox="0 0 \1 \2"', svg, count=1)
    target.write_text(svg)


def _choose_palette(pixels: MatLike, color_count: int) -> MatLike:
    chosen = np.random.default_rng(_SEED).integers(0, len(pixels), min(_SAMPLE_PIXELS, len(pixels)))
    sample = pixels[chosen]
    distinct = np.unique(sample, axis=0)
    if len(distinct) <= color_count:
        return distinct
    cv2.setRNGSeed(_SEED)
    rule = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 30, 0.5)
    start = np.empty((0, 1), np.int32)
    _, _, centres = cv2.kmeans(sample.astype(np.float32), color_count, start, rule, 3, cv2.KMEANS_PP_CENTERS)
    return centres.round().astype(np.uint8)


def _nearest_colors(pixels: MatLike, palette: MatLike) -> MatLike:
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


def apply_operation(kind: Kind, options: Options, image: Path, folder: Path) -> list[Path]:
    """Do the work of a task and give the files of its results, all in this folder.

    Raises:
        RejectedError: the image can't be worked on, with the reason.
        OSError: a file can't be read or written.

    """
    source = load_image(image)
    if kind == "vector":
        return _vectorise(source, options, preview=folder / "image.png", target=folder / "vector.svg")
    if kind == "face":
        return [save_image(enhance_faces(source), folder / "image.png")]
    if kind == "seamless":
        tile = make_seamless(source, options.fit)
        laid = make_grid(tile)
        return [save_image(tile, folder / "image.png"), save_image(laid, folder / "grid.png")]
    enlarged = upscale(source, options)
    results = [save_image(enlarged, folder / "image.png")]
    if options.vector_switch:
        scratch = folder / "flat.png"
        results += _vectorise(enlarged, options, preview=scratch, target=folder / "vector.svg")[1:]
        scratch.unlink()
    return results


def _vectorise(source: MatLike, options: Options, *, preview: Path, target: Path) -> list[Path]:
    flat = reduce_colors(source, options.color_count)
    height, width = source.shape[:2]
    save_image(flat, preview)
    trace_paths(flat, preview, target, (width, height))
    return [preview, target]
