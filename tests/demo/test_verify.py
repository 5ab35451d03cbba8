"""Checks of results against the promise of their kind, and images that suit their kinds."""

from importlib import resources

import pytest
from PIL import Image

from service.demo.run import JOBS
from service.demo.verify import (
    CheckResult,
    UnreadableError,
    open_image,
    read_image,
    seam_strength,
    verify_results,
)
from tests.demo.conftest import SVG, encode_image, tile_mirrored

IMAGES = resources.files("service.demo") / "images"
SENT = {job.kind: job.read_image() for job in JOBS}


def flat_image(width: int, height: int, grey: int = 90) -> bytes:
    return encode_image(Image.new("L", (width, height), grey), "PNG")[1]


def make_svg(attributes: str, inner: str = "") -> bytes:
    return f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>{inner}</svg>'.encode()


@pytest.mark.parametrize(
    ("kind", "files", "invalid"),
    [
        ("upscale", {"image": SENT["upscale"]}, "image"),
        ("upscale", {"image": flat_image(720, 240)}, "image"),
        ("upscale", {"image": b"<html></html>"}, "image"),
        ("vectorize", {"vector": flat_image(9, 9)}, "vector"),
        ("vectorize", {"vector": make_svg("", '<path d=" "/>')}, "vector"),
        ("vectorize", {"vector": SVG[:-6]}, "vector"),
        ("face-enhance", {"image": SENT["face-enhance"]}, "image"),
        ("face-enhance", {"image": flat_image(240, 100)}, "image"),
        ("seamless", {"image": SENT["seamless"], "grid": flat_image(512, 512)}, "image"),
        ("seamless", {"image": flat_image(64, 64), "grid": flat_image(128, 64)}, "grid"),
        ("seamless", {"image": flat_image(64, 64)}, "grid"),
    ],
)
def test_invalid_results(kind: str, files: dict[str, bytes], invalid: str) -> None:
    results = verify_results(kind, SENT[kind], files)
    assert [result.name for result in results if not result.is_valid] == [invalid]


def test_result_beyond_the_promised() -> None:
    """It passes if it can be decoded."""
    files = {"image": flat_image(720, 480), "vector": SVG}
    extra = CheckResult("vector", (320, 320), "readable", is_valid=True)
    assert verify_results("upscale", SENT["upscale"], files)[1] == extra


def test_unreadable() -> None:
    """A truncated image is invalid although its header is complete, and so is an SVG that declares entities."""
    with pytest.raises(UnreadableError):
        open_image(SENT["upscale"][:-2000])
    bomb = b'<!DOCTYPE svg [<!ENTITY a "aaaa">]><svg xmlns="http://www.w3.org/2000/svg">&a;</svg>'
    with pytest.raises(UnreadableError, match="entities"):
        read_image(bomb)


def test_size_of_drawings() -> None:
    """The size is width and height in pixels, otherwise that of the view box, otherwise unknown."""
    for attributes, size in (
        ('width="319.6px" height="200px"', (320, 200)),
        ('width="100%" height="100%" viewBox="0 0 64 32"', (64, 32)),
        ('width="1.2.3" height="4"', None),
    ):
        assert read_image(make_svg(attributes)).size == size


def test_seams() -> None:
    """The seam is that of the worse direction, and zero if the edges match."""
    ramp = Image.linear_gradient("L")
    assert seam_strength(ramp) > 100
    assert seam_strength(ramp.transpose(Image.Transpose.ROTATE_90)) > 100
    assert seam_strength(tile_mirrored(ramp)) == 0
    assert seam_strength(Image.new("L", (1, 8), 90)) == 0


def test_shipped_images() -> None:
    """Each image is small, suits its kind, and has its origin and licence documented; nothing else is shipped."""
    assert {item.name for item in IMAGES.iterdir()} == {job.image_name for job in JOBS} | {"IMAGES.md"}
    lines = (IMAGES / "IMAGES.md").read_text(encoding="utf-8").splitlines()
    for job in JOBS:
        assert len(job.read_image()) < 120_000
        (line,) = [line for line in lines if line.startswith(f"| `{job.image_name}`")]
        assert (f"`{job.kind}`" in line, "CC0" in line or "public domain" in line) == (True, True)
