"""One task: its image in, its results out."""

from __future__ import annotations

from pathlib import Path

from cv2.typing import MatLike

from service.sandbox.dials import Kind
from service.sandbox.forms import Options
from service.sandbox.imaging import faces, picture, seamless, upscale, vector


def produce(kind: Kind, options: Options, image: Path, folder: Path) -> list[Path]:
    """Do the work of a task and give the files of its results, all in this folder.

    Raises:
        RejectedError: the image can't be worked on, with the reason.
        OSError: a file can't be read or written.

    """
    source = picture.load(image)
    if kind == "vector":
        return _vectorise(source, options, preview=folder / "image.png", target=folder / "vector.svg")
    if kind == "face":
        return [picture.save(faces.enhance_faces(source), folder / "image.png")]
    if kind == "seamless":
        tile = seamless.make_seamless(source, options.fit)
        laid = seamless.grid(tile)
        return [picture.save(tile, folder / "image.png"), picture.save(laid, folder / "grid.png")]
    enlarged = upscale.upscale(source, options)
    results = [picture.save(enlarged, folder / "image.png")]
    if options.vector_switch:
        scratch = folder / "flat.png"
        results += _vectorise(enlarged, options, preview=scratch, target=folder / "vector.svg")[1:]
        scratch.unlink()
    return results


def _vectorise(source: MatLike, options: Options, *, preview: Path, target: Path) -> list[Path]:
    flat = vector.flatten(source, options.color_count)
    height, width = source.shape[:2]
    picture.save(flat, preview)
    vector.trace(flat, preview, target, (width, height))
    return [preview, target]
