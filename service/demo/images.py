"""What can be seen in a result: pixels of a raster image, paths of a drawing."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn
from xml.parsers import expat

from PIL import Image, ImageChops, ImageStat

Size = tuple[int, int]
"""Width and height in pixels."""

_SVG = "http://www.w3.org/2000/svg"
_LENGTH = re.compile(r"\s*([0-9.]+)(?:px)?\s*")


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


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of two images in levels of grey (0 to 255), the first brought to the second's size."""
    grey = one.convert("L").resize(other.size)
    return float(ImageStat.Stat(ImageChops.difference(grey, other.convert("L"))).mean[0])


def seam(tile: Image.Image) -> float:
    """How much harder the step across the border is than the steps inside, when the tile is laid beside itself.

    About 1 for a seamless tile; the worse of the two directions counts.
    """
    return max(_seam_of_sides(tile), _seam_of_sides(tile.transpose(Image.Transpose.ROTATE_90)))


def _seam_of_sides(tile: Image.Image) -> float:
    width, height = tile.size
    across = difference(tile.crop((width - 1, 0, width, height)), tile.crop((0, 0, 1, height)))
    if width == 1:
        return across
    inside = difference(tile.crop((1, 0, width, height)), tile.crop((0, 0, width - 1, height)))
    # A flat picture has no steps inside: one level of grey is what rounding alone may cause.
    return across / max(inside, 1.0)


class _SvgReader:
    """Reads only as much of an SVG as the demo shows, and refuses entities, which can be made to explode."""

    def __init__(self) -> None:
        self._parser = expat.ParserCreate(namespace_separator=" ")
        self._parser.StartElementHandler = self._element
        self._parser.EntityDeclHandler = self._entity
        self._root: Mapping[str, str] | None = None
        self._paths = 0

    def read(self, content: bytes) -> Drawing:
        try:
            self._parser.Parse(content, True)
        except expat.ExpatError as error:
            raise UnreadableError("not well-formed XML") from error
        return Drawing(_drawing_size(self._root or {}), self._paths)

    def _element(self, name: str, attributes: Mapping[str, str]) -> None:
        if self._root is None:
            if name != f"{_SVG} svg":
                raise UnreadableError("XML, but no SVG")
            self._root = attributes
        if name == f"{_SVG} path" and attributes.get("d", "").strip():
            self._paths += 1

    def _entity(self, *_: object) -> NoReturn:
        raise UnreadableError("an SVG that declares entities")


def _drawing_size(root: Mapping[str, str]) -> Size | None:
    lengths = [root.get("width", ""), root.get("height", "")]
    if not all(map(_LENGTH.fullmatch, lengths)):
        lengths = root.get("viewBox", "").replace(",", " ").split()[2:]
    try:
        width, height = (round(float(length.strip().removesuffix("px"))) for length in lengths)
    except ValueError:
        return None
    return width, height
