"""The four image operations, without a model.

Pillow alone does them: what a start on a new machine has to install stays small.
"""

from __future__ import annotations

import io
import math
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations, compress
from pathlib import Path
from typing import Final, TypeAlias, cast

from PIL import Image, ImageChops, ImageOps, ImageStat, UnidentifiedImageError
from PIL.ImageFilter import GaussianBlur, MedianFilter, UnsharpMask

from service.sandbox.faults import Kind
from service.sandbox.forms import Options, RejectedError

FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS: Final = 25_000_000
_TOO_MANY_PIXELS_ERROR: Final = f"图片像素过大(最多{MAX_PIXELS // 1_000_000}百万像素)"
_OPAQUE_ALPHA: Final = 128


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


def load_image(path: Path) -> Image.Image:
    """Decode an image as RGB or RGBA and apply its EXIF orientation. Raises RejectedError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                # Pillow would clip values above 255 to white.
                upright = upright.convert("I").point(lambda value: value / 256).convert("L")
            return upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise RejectedError("图片文件已损坏") from error


def save_image(image: Image.Image, path: Path) -> Path:
    """Write an image as PNG, and return the path. Raises OSError."""
    image.save(path, "PNG", compress_level=1)
    return path


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours and the alpha channel, if any."""
    return image.convert("RGB"), image.getchannel("A") if image.mode == "RGBA" else None


def join_alpha(colours: Image.Image, alpha: Image.Image | None) -> Image.Image:
    if alpha:
        colours.putalpha(alpha)
    return colours


def shrink(image: Image.Image, max_pixels: int) -> Image.Image:
    if image.width * image.height <= max_pixels:
        return image
    factor = math.sqrt(max_pixels / (image.width * image.height))
    size = max(1, int(image.width * factor)), max(1, int(image.height * factor))
    return image.resize(size, Image.Resampling.BOX)


def smooth(colours: Image.Image, radius: float, contrast: float) -> Image.Image:
    """Blur by a radius in pixels where the image differs little from its blur; edges above the contrast stay."""
    blurred = colours.filter(GaussianBlur(radius))
    red, green, blue = ImageChops.difference(colours, blurred).split()
    difference = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    weights = difference.point([round(255 * math.exp(-((level / contrast) ** 2))) for level in range(256)])
    return Image.composite(blurred, colours, weights)


def sharpen(colours: Image.Image, radius: float, amount: float) -> Image.Image:
    """Apply an unsharp mask: a blur radius in pixels, and the share of the difference to add."""
    return colours.filter(UnsharpMask(radius, round(100 * amount), threshold=0))


def lift_contrast(colours: Image.Image, amount: float) -> Image.Image:
    """Lift the contrast of large areas."""
    return sharpen(colours, max(colours.size) / 16, amount)


_SKIN_BLUE: Final = range(77, 128)
_SKIN_RED: Final = range(133, 174)
"""The chroma of skin of all tones in YCbCr, after Chai and Ngan (1999)."""
_MIN_SKIN_SHARE: Final = 0.01


def enhance_faces(image: Image.Image) -> Image.Image:
    """Denoise and sharpen the skin and what it surrounds; without any, the whole image slightly."""
    colours, alpha = split_alpha(image)
    skin = find_skin(colours)
    if ImageStat.Stat(skin).mean[0] < 255 * _MIN_SKIN_SHARE:
        return join_alpha(sharpen(smooth(colours, 1.4, 15), 1.2, 0.4), alpha)
    clean = lift_contrast(smooth(colours, 2, 24), 0.2)
    better = sharpen(clean, max(1.0, max(colours.size) / 320), 0.7)
    return join_alpha(Image.composite(better, colours, skin), alpha)


def find_skin(colours: Image.Image) -> Image.Image:
    """Return the weights of the skin, with the eyes and the mouth that it surrounds, fading to 0 outside."""
    _, blue, red = colours.convert("YCbCr").split()
    is_skin = ImageChops.multiply(
        *(
            part.point([255 * (level in skin) for level in range(256)])
            for part, skin in ((blue, _SKIN_BLUE), (red, _SKIN_RED))
        )
    )
    spread = is_skin.filter(MedianFilter(5)).filter(GaussianBlur(max(colours.size) / 40))
    return spread.point([min(255, 2 * level) for level in range(256)])


_MAX_GRID_PIXELS: Final = 16_000_000


def make_seamless(image: Image.Image, fit: float) -> Image.Image:
    """Return a tile of the same size.

    Towards each edge the image fades into a copy shifted by half its size, whose middle has no seam. `fit` is the
    share of the half image that fades: more hides the seam better and loses more of the image.
    """
    width, height = image.size
    across = Image.composite(
        image, ImageChops.offset(image, width // 2, 0), _edge_weights(width, fit).resize(image.size)
    )
    down = _edge_weights(height, fit).transpose(Image.Transpose.ROTATE_90).resize(image.size)
    return Image.composite(across, ImageChops.offset(across, 0, height // 2), down)


def _edge_weights(length: int, fit: float) -> Image.Image:
    """Return a line that rises from 0 at both ends."""
    weights = Image.new("L", (length, 1))
    progress = (min(1, min(x, length - 1 - x) / max(1, fit * (length // 2 - 1))) for x in range(length))
    # Smoothstep: the fade has no visible beginning.
    weights.putdata([round(255 * share * share * (3 - 2 * share)) for share in progress])
    return weights


def make_grid(tile: Image.Image) -> Image.Image:
    """Repeat the tile two by two, within the limit of pixels."""
    small = shrink(tile, _MAX_GRID_PIXELS // 4)
    grid = Image.new(small.mode, (2 * small.width, 2 * small.height))
    for left in (0, small.width):
        for top in (0, small.height):
            grid.paste(small, (left, top))
    return grid


def upscale(image: Image.Image, options: Options) -> Image.Image:
    """Enlarge an image by `options.upscale`. Raises RejectedError if the result would be too large.

    `s_noise` smooths before the enlargement, unless `high_fidelity` is set; `steps` sharpens after it;
    `strong_inpaint` removes specks and lifts the contrast, in proportion to its intensity.
    """
    if image.width * image.height * options.upscale**2 > MAX_PIXELS:
        raise RejectedError(f"放大后的{_TOO_MANY_PIXELS_ERROR}")
    size = round(image.width * options.upscale), round(image.height * options.upscale)
    colours, alpha = split_alpha(image)
    if not options.high_fidelity:
        colours = smooth(colours, 1.4, 6 + 160 * (options.s_noise - 1))
    if options.strong_inpaint:
        clean = lift_contrast(colours.filter(MedianFilter(3)), 0.3)
        colours = Image.blend(colours, clean, options.strong_inpaint_intensity)
    colours = colours.resize(size, Image.Resampling.LANCZOS)
    colours = sharpen(colours, 0.6 + 0.4 * options.upscale, 0.4 + (options.steps - 20) / 40)
    return join_alpha(colours, alpha.resize(size, Image.Resampling.BILINEAR) if alpha else None)


_MAX_VECTOR_PIXELS: Final = 1_000_000
_SAMPLE_PIXELS: Final = 20_000
_MAX_GROUPS: Final = 64
_Colour: TypeAlias = tuple[float, float, float]

# vtracer holds the interpreter's lock while it works, so it runs in a process of its own. The colours are flat already:
# all of their bits are kept apart, and no neighbours are merged.
_TRACE_PROGRAM = """
import sys, vtracer
options = dict(color_precision=8, layer_difference=0, filter_speckle=4, path_precision=2)
sys.stdout.write(vtracer.convert_raw_image_to_svg(sys.stdin.buffer.read(), "png", **options))
"""
_TRACE_TIMEOUT_SECONDS: Final = 120.0
_FILL_PATTERN: Final = re.compile(r'fill="#([0-9A-Fa-f]{6})"')
_SIZE_PATTERN: Final = re.compile(r'width="(\d+)" height="(\d+)"')


def vectorize(image: Image.Image, color_count: int, path: Path) -> Image.Image:
    """Reduce the colours, trace the result into an SVG of the image's size, and return it.

    Raises OSError and subprocess.SubprocessError.
    """
    flat = reduce_colors(image, color_count)
    png = io.BytesIO()
    flat.save(png, "PNG", compress_level=1)
    traced = subprocess.run(  # noqa: S603  # the program is constant
        [sys.executable, "-c", _TRACE_PROGRAM],
        input=png.getvalue(),
        stdout=subprocess.PIPE,
        check=True,
        timeout=_TRACE_TIMEOUT_SECONDS,
    )
    palette = [colour for _, colour in _count_colours(flat)]

    def to_palette(fill: re.Match[str]) -> str:
        # The tracer fills areas of removed specks with a mean colour.
        nearest = min(palette, key=lambda colour: math.dist(colour, bytes.fromhex(fill[1])))
        return 'fill="#{:02x}{:02x}{:02x}"'.format(*nearest)

    svg = _FILL_PATTERN.sub(to_palette, traced.stdout.decode())
    svg = _SIZE_PATTERN.sub(rf'width="{image.width}" height="{image.height}" viewBox="0 0 \1 \2"', svg, count=1)
    path.write_text(svg)
    return flat


def reduce_colors(image: Image.Image, color_count: int) -> Image.Image:
    """Reduce the colours, make each pixel opaque or clear, and limit the size for tracing."""
    colours, alpha = split_alpha(shrink(image, _MAX_VECTOR_PIXELS))
    colours = smooth(colours, 1.4, 20)
    opaque = alpha.point([255 * (level >= _OPAQUE_ALPHA) for level in range(256)]) if alpha else None
    palette = _choose_palette(colours, opaque, color_count)
    return join_alpha(colours.quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB"), opaque)


def _choose_palette(colours: Image.Image, opaque: Image.Image | None, color_count: int) -> Image.Image:
    """Return an image with the palette of the opaque pixels, or of all if none is."""
    share = min(1, math.sqrt(_SAMPLE_PIXELS / (colours.width * colours.height)))
    size = max(1, int(colours.width * share)), max(1, int(colours.height * share))
    sample = colours.resize(size, Image.Resampling.NEAREST)
    if opaque:
        pixels = cast("tuple[tuple[int, ...], ...]", sample.get_flattened_data())
        mask = opaque.resize(size, Image.Resampling.NEAREST).get_flattened_data()
        if visible := list(compress(pixels, mask)):
            sample = Image.new("RGB", (len(visible), 1))
            sample.putdata(visible)
    # Pillow's methods alone lose small areas, or areas of similar colours.
    groups = _count_colours(sample.quantize(_MAX_GROUPS, Image.Quantize.MEDIANCUT, kmeans=1).convert("RGB"))
    while len(groups) > color_count:
        groups = _merge_nearest(groups)
    palette = Image.new("P", (1, 1))
    palette.putpalette([round(level) for _, colour in groups for level in colour])
    return palette


def _count_colours(image: Image.Image) -> list[tuple[int, _Colour]]:
    """Return the colours of an image that has at most 256, with their numbers of pixels."""
    return cast("list[tuple[int, _Colour]]", image.convert("RGB").getcolors())


def _merge_nearest(groups: Sequence[tuple[int, _Colour]]) -> list[tuple[int, _Colour]]:
    """Merge the two groups of pixels that increase the squared error least (Ward's method)."""

    def added_error(pair: tuple[tuple[int, _Colour], tuple[int, _Colour]]) -> float:
        (count, colour), (other_count, other) = pair
        return count * other_count / (count + other_count) * math.dist(colour, other) ** 2

    one, other = min(combinations(groups, 2), key=added_error)
    count = one[0] + other[0]
    mean = [(one[0] * a + other[0] * b) / count for a, b in zip(one[1], other[1], strict=True)]
    return [(count, (mean[0], mean[1], mean[2])), *(group for group in groups if group not in {one, other})]


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
