"""Checks of the demo's results."""

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn
from xml.parsers import expat

from PIL import Image, ImageChops, ImageStat

Size = tuple[int, int]
"""Width and height in pixels."""
_SVG_NAMESPACE = "http://www.w3.org/2000/svg"
_LENGTH_PATTERN = re.compile(r"\s*([0-9.]+)(?:px)?\s*")


class UnreadableError(Exception):
    """The bytes are not what they should be; the message completes "it is ..."."""


@dataclass(frozen=True, slots=True)
class Drawing:
    size: Size | None
    """None if the drawing names no size of its own."""
    paths: int


def read_image(content: bytes) -> Image.Image | Drawing:
    """Decode a result whole, so that one cut short is found out.

    Raises:
        UnreadableError: it is neither an SVG nor a raster image.
    """
    return _SvgReader().read(content) if content.lstrip()[:1] == b"<" else open_image(content)


def open_image(content: bytes) -> Image.Image:
    """Decode a raster image. Raises `UnreadableError`."""
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableError("not an image, or not a whole one") from error
    return image


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of two images in levels of grey (0 to 255), the first brought to the second's size."""
    grey = one.convert("L").resize(other.size)
    return float(ImageStat.Stat(ImageChops.difference(grey, other.convert("L"))).mean[0])


def seam_strength(tile: Image.Image) -> float:
    """How much harder the step across the border is than the steps inside, when the tile is laid beside itself.

    About 1 for a seamless tile; the worse of the two directions counts.
    """
    return max(_side_seam_strength(tile), _side_seam_strength(tile.transpose(Image.Transpose.ROTATE_90)))


def _side_seam_strength(tile: Image.Image) -> float:
    width, height = tile.size
    across = mean_difference(tile.crop((width - 1, 0, width, height)), tile.crop((0, 0, 1, height)))
    if width == 1:
        return across
    inside = mean_difference(tile.crop((1, 0, width, height)), tile.crop((0, 0, width - 1, height)))
    # A flat picture has no steps inside: one level of grey is what rounding alone may cause.
    return across / max(inside, 1.0)


class _SvgReader:
    """Reads only as much of an SVG as the demo shows, and refuses entities, which can be made to explode."""

    def __init__(self) -> None:
        self._parser = expat.ParserCreate(namespace_separator=" ")
        self._parser.StartElementHandler = self._on_element
        self._parser.EntityDeclHandler = self._on_entity
        self._root: Mapping[str, str] | None = None
        self._paths = 0

    def read(self, content: bytes) -> Drawing:
        try:
            self._parser.Parse(content, True)
        except expat.ExpatError as error:
            raise UnreadableError("not well-formed XML") from error
        return Drawing(_parse_drawing_size(self._root or {}), self._paths)

    def _on_element(self, name: str, attributes: Mapping[str, str]) -> None:
        if self._root is None:
            if name != f"{_SVG_NAMESPACE} svg":
                raise UnreadableError("XML, but no SVG")
            self._root = attributes
        if name == f"{_SVG_NAMESPACE} path" and attributes.get("d", "").strip():
            self._paths += 1

    def _on_entity(self, *_: object) -> NoReturn:
        raise UnreadableError("an SVG that declares entities")


def _parse_drawing_size(root: Mapping[str, str]) -> Size | None:
    lengths = [root.get("width", ""), root.get("height", "")]
    if not all(map(_LENGTH_PATTERN.fullmatch, lengths)):
        lengths = root.get("viewBox", "").replace(",", " ").split()[2:]
    try:
        width, height = (round(float(length.strip().removesuffix("px"))) for length in lengths)
    except ValueError:
        return None
    return width, height


MAX_SEAM = 1.5
"""A border this much harder than the inside of the tile is seen as a line."""
MIN_CHANGE = 0.1
"""In levels of grey. Compressing a picture again changes it by more; sending it back as it was, by nothing."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What was seen in one result, or that it is missing."""

    name: str
    size: Size | None
    text: str
    """What makes it real, or a sentence on what is wrong."""
    is_valid: bool


class _MismatchError(Exception):
    """A result is not what its kind promises; the message is a sentence for the user."""


@dataclass(frozen=True, slots=True)
class _TaskFiles:
    original: Image.Image
    files: Mapping[str, bytes]

    def read_raster(self, name: str) -> Image.Image:
        seen = self.read(name)
        if isinstance(seen, Drawing):
            raise _MismatchError(f"the {name} is a drawing, not made of pixels")
        return seen

    def read_drawing(self, name: str) -> Drawing:
        seen = self.read(name)
        if not isinstance(seen, Drawing):
            raise _MismatchError(f"the {name} is made of pixels, not a drawing")
        return seen

    def read(self, name: str) -> Image.Image | Drawing:
        if name not in self.files:
            raise _MismatchError(f"no {name} came back")
        try:
            return read_image(self.files[name])
        except UnreadableError as error:
            raise _MismatchError(f"the {name} is {error}") from error


def _check_upscale(evidence: _TaskFiles) -> str:
    width, height = evidence.read_raster("image").size
    least = min(width / evidence.original.width, height / evidence.original.height)
    if least <= 1:
        raise _MismatchError(
            f"the image is {format_size((width, height))}, not larger than what was sent,"
            f" {format_size(evidence.original.size)}"
        )
    return f"{least:.1f} times as wide and high"


def _check_vector(evidence: _TaskFiles) -> str:
    paths = evidence.read_drawing("vector").paths
    if not paths:
        raise _MismatchError("the vector holds no path")
    return f"{paths} path{'' if paths == 1 else 's'}"


def _check_face(evidence: _TaskFiles) -> str:
    image = evidence.read_raster("image")
    if image.width < evidence.original.width or image.height < evidence.original.height:
        raise _MismatchError(
            f"the image is {format_size(image.size)}, smaller than what was sent, {format_size(evidence.original.size)}"
        )
    if mean_difference(image, evidence.original) < MIN_CHANGE:
        raise _MismatchError("the image is what was sent, nothing is restored")
    return "changed, none of it lost"


def _check_tile(evidence: _TaskFiles) -> str:
    strength = seam_strength(evidence.read_raster("image"))
    if strength > MAX_SEAM:
        raise _MismatchError(f"the tile's edges do not meet: the seam is {strength:.1f} times as hard as the inside")
    return f"edges meet (seam {strength:.1f}, was {seam_strength(evidence.original):.1f})"


def _check_grid(evidence: _TaskFiles) -> str:
    grid, tile = evidence.read_raster("grid"), evidence.read_raster("image")
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
"""For each kind the results that must come, with what says or denies that they are real."""


def verify_results(kind: str, picture: bytes, files: Mapping[str, bytes]) -> tuple[CheckResult, ...]:
    """Look at the results of a task, given by their names, against the picture that was sent.

    A promised result that did not come gets a finding too. One that was not promised need only be readable.
    """
    promises = _CHECKS[kind]
    evidence = _TaskFiles(open_image(picture), files)
    return tuple(_check_result(name, promises.get(name), evidence) for name in dict.fromkeys((*promises, *files)))


def format_size(size: Size | None) -> str:
    return "" if size is None else f"{size[0]} x {size[1]}"


def _check_result(name: str, promise: Callable[[_TaskFiles], str] | None, evidence: _TaskFiles) -> CheckResult:
    size = None
    try:
        size = evidence.read(name).size
        text = promise(evidence) if promise else "readable"
    except _MismatchError as error:
        return CheckResult(name, size, str(error), is_valid=False)
    return CheckResult(name, size, text, is_valid=True)
