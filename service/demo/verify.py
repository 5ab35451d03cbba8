"""Checks of the demo's results against the images submitted."""

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from PIL import Image, ImageChops, ImageStat

Size = tuple[int, int]
"""Width and height in pixels."""
MAX_SEAM = 1.5
"""A border this much harder than the inside of the tile is visible as a line."""
MIN_CHANGE = 0.1
"""In levels of grey: compressing an image again changes it by more, returning it unchanged by 0."""
_SVG_NAMESPACE = "{http://www.w3.org/2000/svg}"
_LENGTH_PATTERN = re.compile(r"\s*([0-9.]+)(?:px)?\s*")


class UnreadableError(Exception):
    """Bytes of another format; the message completes "it is ..."."""


@dataclass(frozen=True, slots=True)
class Drawing:
    size: Size | None
    paths: int


def read_image(content: bytes) -> Image.Image | Drawing:
    """Decode all of a result, so that a truncated one fails. Raises UnreadableError."""
    return _read_svg(content) if content.lstrip()[:1] == b"<" else open_image(content)


def open_image(content: bytes) -> Image.Image:
    """Decode a raster image. Raises UnreadableError."""
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableError("not an image, or not a whole one") from error
    return image


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    """Return the mean difference in levels of grey (0 to 255), the first image resized to the second."""
    grey = one.convert("L").resize(other.size)
    return float(ImageStat.Stat(ImageChops.difference(grey, other.convert("L"))).mean[0])


def seam_strength(tile: Image.Image) -> float:
    """Return the step across the border of adjacent tiles, relative to the steps inside: about 1 if seamless."""
    return max(_side_seam_strength(tile), _side_seam_strength(tile.transpose(Image.Transpose.ROTATE_90)))


def _side_seam_strength(tile: Image.Image) -> float:
    width, height = tile.size
    across = mean_difference(tile.crop((width - 1, 0, width, height)), tile.crop((0, 0, 1, height)))
    if width == 1:
        return across
    inside = mean_difference(tile.crop((1, 0, width, height)), tile.crop((0, 0, width - 1, height)))
    # A flat image has no steps inside; rounding alone may cause one level of grey.
    return across / max(inside, 1.0)


def _read_svg(content: bytes) -> Drawing:
    """Count the paths of an SVG. Refuses entities, since they can expand without bound."""
    if b"<!ENTITY" in content:
        raise UnreadableError("an SVG that declares entities")
    try:
        root = ET.fromstring(content)  # noqa: S314  # expat limits entities in other encodings
    except ET.ParseError as error:
        raise UnreadableError("not well-formed XML") from error
    if root.tag != f"{_SVG_NAMESPACE}svg":
        raise UnreadableError("XML, but no SVG")
    paths = [path for path in root.iter(f"{_SVG_NAMESPACE}path") if path.get("d", "").strip()]
    return Drawing(_parse_drawing_size(root.attrib), len(paths))


def _parse_drawing_size(root: Mapping[str, str]) -> Size | None:
    lengths = [root.get("width", ""), root.get("height", "")]
    if not all(map(_LENGTH_PATTERN.fullmatch, lengths)):
        lengths = root.get("viewBox", "").replace(",", " ").split()[2:]
    try:
        width, height = (round(float(length.strip().removesuffix("px"))) for length in lengths)
    except ValueError:
        return None
    return width, height


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The outcome of the check of one result."""

    name: str
    size: Size | None
    text: str
    """A property that shows it is valid, or the error."""
    is_valid: bool


class _MismatchError(Exception):
    """A result does not match its kind."""


@dataclass(frozen=True, slots=True)
class _TaskFiles:
    original: Image.Image
    files: Mapping[str, bytes]

    def read_raster(self, name: str) -> Image.Image:
        image = self.read(name)
        if isinstance(image, Drawing):
            raise _MismatchError(f"the {name} is a drawing, not made of pixels")
        return image

    def read_drawing(self, name: str) -> Drawing:
        drawing = self.read(name)
        if not isinstance(drawing, Drawing):
            raise _MismatchError(f"the {name} is made of pixels, not a drawing")
        return drawing

    def read(self, name: str) -> Image.Image | Drawing:
        if name not in self.files:
            raise _MismatchError(f"no {name} came back")
        try:
            return read_image(self.files[name])
        except UnreadableError as error:
            raise _MismatchError(f"the {name} is {error}") from error


def _check_upscale(task_files: _TaskFiles) -> str:
    width, height = task_files.read_raster("image").size
    factor = min(width / task_files.original.width, height / task_files.original.height)
    if factor <= 1:
        raise _MismatchError(
            f"the image is {format_size((width, height))}, not larger than the original,"
            f" {format_size(task_files.original.size)}"
        )
    return f"{factor:.1f} times as wide and high"


def _check_vector(task_files: _TaskFiles) -> str:
    paths = task_files.read_drawing("vector").paths
    if not paths:
        raise _MismatchError("the vector holds no path")
    return f"{paths} path{'' if paths == 1 else 's'}"


def _check_face(task_files: _TaskFiles) -> str:
    image = task_files.read_raster("image")
    if image.width < task_files.original.width or image.height < task_files.original.height:
        raise _MismatchError(
            f"the image is {format_size(image.size)}, smaller than the original,"
            f" {format_size(task_files.original.size)}"
        )
    if mean_difference(image, task_files.original) < MIN_CHANGE:
        raise _MismatchError("the image is unchanged, nothing is restored")
    return "changed, not smaller"


def _check_tile(task_files: _TaskFiles) -> str:
    strength = seam_strength(task_files.read_raster("image"))
    if strength > MAX_SEAM:
        raise _MismatchError(f"the tile's edges do not meet: the seam is {strength:.1f} times as hard as the inside")
    return f"edges meet (seam {strength:.1f}, was {seam_strength(task_files.original):.1f})"


def _check_grid(task_files: _TaskFiles) -> str:
    grid, tile = task_files.read_raster("grid"), task_files.read_raster("image")
    if grid.width <= tile.width or grid.height <= tile.height:
        raise _MismatchError(
            f"the grid is {format_size(grid.size)}, not larger than the tile, {format_size(tile.size)}"
        )
    return "larger than the tile"


_CHECKS: Mapping[str, Mapping[str, Callable[[_TaskFiles], str]]] = {
    "upscale": {"image": _check_upscale},
    "vectorize": {"vector": _check_vector},
    "face-enhance": {"image": _check_face},
    "seamless": {"image": _check_tile, "grid": _check_grid},
}
"""Required results by kind, each with its check."""


def verify_results(kind: str, image: bytes, files: Mapping[str, bytes]) -> tuple[CheckResult, ...]:
    """Check the results of a task against the submitted image. A missing result gets an entry too.

    Additional results need only be readable.
    """
    checks = _CHECKS[kind]
    task_files = _TaskFiles(open_image(image), files)
    return tuple(_check_result(name, checks.get(name), task_files) for name in dict.fromkeys((*checks, *files)))


def format_size(size: Size | None) -> str:
    return "" if size is None else f"{size[0]} x {size[1]}"


def _check_result(name: str, check: Callable[[_TaskFiles], str] | None, task_files: _TaskFiles) -> CheckResult:
    size = None
    try:
        size = task_files.read(name).size
        text = check(task_files) if check else "readable"
    except _MismatchError as error:
        return CheckResult(name, size, str(error), is_valid=False)
    return CheckResult(name, size, text, is_valid=True)
