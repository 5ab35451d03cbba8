"""What a result is by its bytes."""

from __future__ import annotations

import time

import pytest
from PIL import Image

from service.domain.media import BEGINNING, EXTENSIONS, JPEG, OPAQUE, PNG, SVG, WEBP, fits, seen_type
from service.domain.tasks import ArtifactName
from tests.support.images import encoded


@pytest.mark.parametrize(("form", "media_type"), [("PNG", PNG), ("JPEG", JPEG), ("WEBP", WEBP), ("GIF", OPAQUE)])
def test_seen_bitmaps(form: str, media_type: str) -> None:
    """A bitmap is told by its first bytes."""
    assert seen_type(encoded(Image.new("RGB", (4, 4)), form)) == media_type


@pytest.mark.parametrize(
    "text",
    [
        "<svg/>",
        "<svg>",
        "\ufeff<svg xmlns='http://www.w3.org/2000/svg'>",
        "\n\t<?xml version='1.0'?>\n<!-- a > b --><!-- c --><svg >",
        "<!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1//EN' 'x.dtd'><svg\n>",
        "<!DOCTYPE svg [<!ENTITY a 'b'>]><svg:svg >",
    ],
)
def test_seen_svg(text: str) -> None:
    """An SVG is told by its root, whatever comes before that."""
    assert seen_type(text.encode()) == SVG


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html><svg/></html>",
        "<!DOCTYPE html><svg/>",
        "<?xml version='1.0'?><html xmlns='http://www.w3.org/1999/xhtml'><svg/></html>",
        "<!-- <svg> -->",
        "<svgx>",
        "x<svg>",
        '{"a": "<svg>"}',
        "RIFF....WAVE",
    ],
)
def test_seen_other(text: str) -> None:
    """What only mentions an SVG is none, nor is anything else an image."""
    assert seen_type(text.encode()) == OPAQUE


@pytest.mark.parametrize("text", ["<!---->", "<?a?>", " ", "<!DOCTYPE svg>", "<!--", "<!DOCTYPE svg ["])
def test_seen_in_time(text: str) -> None:
    """A beginning that is made to be hard to read does not take long."""
    begun = time.perf_counter()
    assert seen_type((text * BEGINNING)[:BEGINNING].encode()) == OPAQUE
    assert time.perf_counter() - begun < 0.5


def test_fitting() -> None:
    """Bitmaps are images and grids, an SVG is a vector, and nothing else is any of them."""
    fitting = {(name.value, media_type) for name in ArtifactName for media_type in EXTENSIONS if fits(name, media_type)}
    bitmaps = {(name, media_type) for name in ("image", "grid") for media_type in (PNG, JPEG, WEBP)}
    assert fitting == bitmaps | {("vector", SVG)}
    assert not fits(ArtifactName.IMAGE, "text/html")
