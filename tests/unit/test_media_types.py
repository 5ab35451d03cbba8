"""What a result is by its bytes."""

from __future__ import annotations

import time

import pytest
from PIL import Image

from service.domain.media import (
    EXTENSIONS,
    JPEG,
    OCTET_STREAM,
    PNG,
    SNIFF_BYTES,
    SVG,
    WEBP,
    is_allowed_type,
    sniff_type,
)
from service.domain.tasks import ArtifactName
from tests.support.images import encode_image


@pytest.mark.parametrize(("form", "media_type"), [("PNG", PNG), ("JPEG", JPEG), ("WEBP", WEBP), ("GIF", OCTET_STREAM)])
def test_seen_bitmaps(form: str, media_type: str) -> None:
    """A bitmap is told by its first bytes."""
    assert sniff_type(encode_image(Image.new("RGB", (4, 4)), form)) == media_type


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
    assert sniff_type(text.encode()) == SVG


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
    assert sniff_type(text.encode()) == OCTET_STREAM


@pytest.mark.parametrize("text", ["<!---->", "<?a?>", " ", "<!DOCTYPE svg>", "<!--", "<!DOCTYPE svg ["])
def test_seen_in_time(text: str) -> None:
    """A beginning that is made to be hard to read does not take long."""
    begun = time.perf_counter()
    assert sniff_type((text * SNIFF_BYTES)[:SNIFF_BYTES].encode()) == OCTET_STREAM
    assert time.perf_counter() - begun < 0.5


def test_fitting() -> None:
    """Bitmaps are images and grids, an SVG is a vector, and nothing else is any of them."""
    fitting = {
        (name.value, media_type)
        for name in ArtifactName
        for media_type in EXTENSIONS
        if is_allowed_type(name, media_type)
    }
    bitmaps = {(name, media_type) for name in ("image", "grid") for media_type in (PNG, JPEG, WEBP)}
    assert fitting == bitmaps | {("vector", SVG)}
    assert not is_allowed_type(ArtifactName.IMAGE, "text/html")
