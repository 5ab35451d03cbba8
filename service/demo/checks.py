"""Whether the results of a task are what its kind promises, judged by looking at them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from PIL import Image

from service.demo.images import Drawing, Size, UnreadableError, difference, open_image, read_image, seam

MOST_SEAM = 1.5
"""A border this much harder than the inside of the tile is seen as a line."""
LEAST_CHANGE = 0.1
"""In levels of grey. Compressing a picture again changes it by more; sending it back as it was, by nothing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was seen in one result, or that it is missing."""

    name: str
    size: Size | None
    text: str
    """What makes it real, or a sentence on what is wrong."""
    real: bool


class _MismatchError(Exception):
    """A result is not what its kind promises; the message is a sentence for the user."""


@dataclass(frozen=True, slots=True)
class _Evidence:
    sent: Image.Image
    files: Mapping[str, bytes]

    def image(self, name: str) -> Image.Image:
        seen = self.see(name)
        if isinstance(seen, Drawing):
            raise _MismatchError(f"the {name} is a drawing, not made of pixels")
        return seen

    def drawing(self, name: str) -> Drawing:
        seen = self.see(name)
        if not isinstance(seen, Drawing):
            raise _MismatchError(f"the {name} is made of pixels, not a drawing")
        return seen

    def see(self, name: str) -> Image.Image | Drawing:
        if name not in self.files:
            raise _MismatchError(f"no {name} came back")
        try:
            return read_image(self.files[name])
        except UnreadableError as error:
            raise _MismatchError(f"the {name} is {error}") from error


def _upscaled(evidence: _Evidence) -> str:
    width, height = evidence.image("image").size
    least = min(width / evidence.sent.width, height / evidence.sent.height)
    if least <= 1:
        raise _MismatchError(
            f"the image is {size_text((width, height))}, not larger than what was sent, {size_text(evidence.sent.size)}"
        )
    return f"{least:.1f} times as wide and high"


def _vectorized(evidence: _Evidence) -> str:
    paths = evidence.drawing("vector").paths
    if not paths:
        raise _MismatchError("the vector holds no path")
    return f"{paths} path{'' if paths == 1 else 's'}"


def _restored(evidence: _Evidence) -> str:
    image = evidence.image("image")
    if image.width < evidence.sent.width or image.height < evidence.sent.height:
        raise _MismatchError(
            f"the image is {size_text(image.size)}, smaller than what was sent, {size_text(evidence.sent.size)}"
        )
    if difference(image, evidence.sent) < LEAST_CHANGE:
        raise _MismatchError("the image is what was sent, nothing is restored")
    return "changed, none of it lost"


def _seamless(evidence: _Evidence) -> str:
    strength = seam(evidence.image("image"))
    if strength > MOST_SEAM:
        raise _MismatchError(f"the tile's edges do not meet: the seam is {strength:.1f} times as hard as the inside")
    return f"edges meet (seam {strength:.1f}, was {seam(evidence.sent):.1f})"


def _gridded(evidence: _Evidence) -> str:
    grid, tile = evidence.image("grid"), evidence.image("image")
    if grid.width <= tile.width or grid.height <= tile.height:
        raise _MismatchError(f"the grid is {size_text(grid.size)}, not larger than the tile, {size_text(tile.size)}")
    return "larger than the tile"


_PROMISES: Mapping[str, Mapping[str, Callable[[_Evidence], str]]] = {
    "upscale": {"image": _upscaled},
    "vectorize": {"vector": _vectorized},
    "face-enhance": {"image": _restored},
    "seamless": {"image": _seamless, "grid": _gridded},
}
"""For each kind the results that must come, with what says or denies that they are real."""


def examine(kind: str, picture: bytes, files: Mapping[str, bytes]) -> tuple[Finding, ...]:
    """Look at the results of a task, given by their names, against the picture that was sent.

    A promised result that did not come gets a finding too. One that was not promised need only be readable.
    """
    promises = _PROMISES[kind]
    evidence = _Evidence(open_image(picture), files)
    return tuple(_judge(name, promises.get(name), evidence) for name in dict.fromkeys((*promises, *files)))


def size_text(size: Size | None) -> str:
    return "" if size is None else f"{size[0]} x {size[1]}"


def _judge(name: str, promise: Callable[[_Evidence], str] | None, evidence: _Evidence) -> Finding:
    size = None
    try:
        size = evidence.see(name).size
        text = promise(evidence) if promise else "readable"
    except _MismatchError as error:
        return Finding(name, size, str(error), real=False)
    return Finding(name, size, text, real=True)
