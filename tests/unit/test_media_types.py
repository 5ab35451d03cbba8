"""Detection of artifact types."""

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
def test_bitmaps_by_their_first_bytes(form: str, media_type: str) -> None:
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
def test_svg_by_its_root_element(text: str) -> None:
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
def test_other_content_is_no_image(text: str) -> None:
    assert sniff_type(text.encode()) == OCTET_STREAM


@pytest.mark.parametrize("text", ["<!---->", "<?a?>", " ", "<!DOCTYPE svg>", "<!--", "<!DOCTYPE svg ["])
def test_hostile_prefix_is_detected_quickly(text: str) -> None:
    begun = time.perf_counter()
    assert sniff_type((text * SNIFF_BYTES)[:SNIFF_BYTES].encode()) == OCTET_STREAM
    assert time.perf_counter() - begun < 0.5


def test_types_allowed_per_artifact() -> None:
    fitting = {
        (name.value, media_type)
        for name in ArtifactName
        for media_type in EXTENSIONS
        if is_allowed_type(name, media_type)
    }
    bitmaps = {(name, media_type) for name in ("image", "grid") for media_type in (PNG, JPEG, WEBP)}
    assert fitting == bitmaps | {("vector", SVG)}
    assert not is_allowed_type(ArtifactName.IMAGE, "text/html")
