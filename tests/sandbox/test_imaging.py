"""The imaging operations: each result has the properties of its kind."""

from __future__ import annotations

import io
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import cv2
import numpy as np
import pytest
from cv2.typing import MatLike
from PIL import Image

from service.sandbox import imaging
from service.sandbox.faults import Kind
from service.sandbox.forms import Options, RejectedError
from service.sandbox.imaging import apply_operation
from tests.support.images import make_png

RED, WHITE, BLUE = (200, 30, 40), (255, 255, 255), (20, 60, 180)
PATH = "{http://www.w3.org/2000/svg}path"


def encode_image(image: MatLike) -> bytes:
    return bytes(cv2.imencode(".png", image)[1])


def draw_logo() -> MatLike:
    """Draw three flat colours: a disc and a bar on white."""
    image = np.full((240, 320, 3), WHITE, np.uint8)
    cv2.circle(image, (110, 120), 80, RED[::-1], -1, cv2.LINE_AA)
    cv2.rectangle(image, (200, 60), (290, 180), BLUE[::-1], -1)
    return image


def draw_scene(height: int = 240, width: int = 320) -> MatLike:
    """Draw a colour gradient with soft texture, whose opposite edges differ."""
    random = np.random.default_rng(3)
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    slope = np.dstack((255 * across, 120 + 100 * down, 255 * (1 - across)))
    texture = cv2.GaussianBlur(random.normal(0, 60, (height, width, 1)).astype(np.float32), (0, 0), 2)
    return np.clip(slope + 3 * texture[:, :, np.newaxis], 0, 255).astype(np.uint8)


def draw_face() -> MatLike:
    """Draw a face in even light on a plain wall, with grain."""
    image = np.full((360, 360, 3), (150, 140, 120), np.uint8)
    shapes = [((180, 190), (88, 118), (150, 180, 225)), ((180, 264), (34, 11), (80, 75, 160))]
    for x in (145, 215):
        eyebrow, eye = ((x, 150), (26, 7), (50, 60, 85)), ((x, 172), (24, 15), (95, 120, 165))
        shapes += [eyebrow, eye, ((x, 172), (8, 8), (40, 40, 45))]
    for centre, axes, colour in shapes:
        cv2.ellipse(image, centre, axes, 0, 0, 360, colour, -1, cv2.LINE_AA)
    grain = np.random.default_rng(1).normal(0, 5, image.shape)
    return np.clip(cv2.GaussianBlur(image, (0, 0), 2.5) + grain, 0, 255).astype(np.uint8)


def run_operation(kind: Kind, options: Options, image: bytes, folder: Path) -> dict[str, Path]:
    """Run an operation and return its results by name."""
    (folder / "input").write_bytes(image)
    return {path.name: path for path in apply_operation(kind, options, folder / "input", folder)}


def read_image(path: Path) -> MatLike:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None
    return image


def sharpness(image: MatLike) -> float:
    return float(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.CV_64F).var())


def edge_difference(first: MatLike, second: MatLike) -> float:
    """Return the mean difference between two adjacent lines of pixels."""
    return float(np.abs(first.astype(int) - second.astype(int)).mean())


def test_upscaled_image_equals_the_original_when_scaled_down(tmp_path: Path) -> None:
    scene = draw_scene()
    for factor in (1.5, 4):
        large = imaging.upscale(scene, Options(upscale=factor))
        assert large.shape == (round(240 * factor), round(320 * factor), 3)
        assert edge_difference(cv2.resize(large, (320, 240), interpolation=cv2.INTER_AREA), scene) < 8
    with pytest.raises(RejectedError, match="像素过大"):
        run_operation("upscale", Options(upscale=8), make_png(700, 700), tmp_path)


def test_steps_sharpen_noise_smooths_and_inpainting_changes() -> None:
    logo, scene = draw_logo(), draw_scene()
    stretched = cv2.resize(logo, None, fx=3, fy=3, interpolation=cv2.INTER_LANCZOS4)
    few, many = (imaging.upscale(logo, Options(upscale=3, steps=steps)) for steps in (20, 40))
    assert sharpness(stretched) < sharpness(few) < sharpness(many)
    grain = np.random.default_rng(2).normal(128, 6, (120, 120, 3)).astype(np.uint8)
    strong, weak = (imaging.upscale(grain, Options(s_noise=noise)) for noise in (1.1, 1.0))
    assert strong.std() < weak.std() < imaging.upscale(grain, Options(high_fidelity=True)).std()
    plain = imaging.upscale(scene, Options())
    half, full = (
        imaging.upscale(scene, Options(strong_inpaint=True, strong_inpaint_intensity=share)) for share in (0.3, 1)
    )
    assert 0 < edge_difference(half, plain) < edge_difference(full, plain)


def test_flat_colours_become_a_few_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for viewport in ("0 0 320 240", "0 0 115 86"):
        results = run_operation("vector", Options(color_count=3), encode_image(draw_logo()), tmp_path)
        root = ET.fromstring(results["vector.svg"].read_text())  # noqa: S314  # it was made here
        assert (root.get("width"), root.get("height"), root.get("viewBox")) == ("320", "240", viewport)
        fills = [bytes.fromhex(path.get("fill", "")[1:]) for path in root.findall(PATH)]
        assert 3 <= len(fills) <= 8
        for colour in (RED, WHITE, BLUE):
            assert any(max(abs(a - b) for a, b in zip(fill, colour, strict=True)) < 16 for fill in fills)
        monkeypatch.setattr(imaging, "_MAX_VECTOR_PIXELS", 10_000)
    scene = encode_image(draw_scene())
    many = run_operation("vector", Options(color_count=16), scene, tmp_path)["vector.svg"].read_text()
    assert 3 <= len(set(re.findall(r'fill="(#[0-9a-f]{6})"', many))) <= 16


def test_opposite_edges_of_a_tile_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = draw_scene()
    inside = np.mean([edge_difference(scene[:, x], scene[:, x + 1]) for x in range(100, 200)])
    for fit in (0.1, 0.9):
        tile = imaging.make_seamless(scene, fit)
        assert tile.shape == scene.shape
        assert max(edge_difference(tile[:, 0], tile[:, -1]), edge_difference(tile[0], tile[-1])) < 2 * inside
        assert edge_difference(tile[120, 160], scene[120, 160]) <= 1
    results = run_operation("seamless", Options(), encode_image(scene), tmp_path)
    tile, grid = (read_image(results[name]) for name in ("image.png", "grid.png"))
    assert np.array_equal(grid, np.block([[[tile], [tile]], [[tile], [tile]]]))
    monkeypatch.setattr(imaging, "_MAX_GRID_PIXELS", 10_000)
    assert imaging.make_grid(np.zeros((300, 300, 3), np.uint8)).shape == (100, 100, 3)


def test_only_the_skin_of_a_face_is_smoothed() -> None:
    image = np.full((600, 800, 3), (150, 140, 120), np.uint8)
    image[100:460, 200:560] = draw_face()
    ((left, top, width, height),) = imaging.find_faces(image)
    assert (left < 380 < left + width, top < 290 < top + height) == (True, True)
    restored = imaging.enhance_faces(image)
    cheek = (slice(315, 335), slice(325, 345))
    assert restored[cheek].std(axis=(0, 1)).mean() < 0.8 * image[cheek].std(axis=(0, 1)).mean()
    assert np.array_equal(restored[:60], image[:60])
    scene = draw_scene()
    assert imaging.find_faces(scene) == []
    assert 0 < edge_difference(imaging.enhance_faces(scene), scene) < 10


def test_common_formats_keep_their_size(tmp_path: Path) -> None:
    for mode, suffix in (("RGBA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("1", "PNG"), ("RGB", "WEBP"), ("L", "TIFF")):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), RED).convert(mode).save(buffer, suffix)
        results = run_operation("seamless", Options(), buffer.getvalue(), tmp_path)
        assert read_image(results["image.png"]).shape[:2] == (30, 40)
    kinds: list[Kind] = ["upscale", "vector", "face", "seamless"]
    transparent = np.zeros((40, 40, 4), np.uint8)
    transparent[10:30, 10:30] = 255
    for kind in kinds:
        results = run_operation(kind, Options(), encode_image(transparent), tmp_path)
        alpha = read_image(results["image.png"])[:, :, 3]
        assert (alpha.min(), alpha.max()) == (0, 255)
        assert run_operation(kind, Options(), encode_image(transparent[:1, :1]), tmp_path)


def test_16_bit_grey_and_orientation_in_exif(tmp_path: Path) -> None:
    shades = np.tile(np.linspace(0, 65535, 64, dtype=np.uint16), (64, 1))
    result = run_operation("upscale", Options(high_fidelity=True), encode_image(shades), tmp_path)["image.png"]
    assert np.abs(read_image(result)[32, :, 0].astype(int) - (shades[32] >> 8)).max() < 10
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "JPEG", exif=exif)
    result = run_operation("upscale", Options(), buffer.getvalue(), tmp_path)["image.png"]
    assert read_image(result).shape == (40, 30, 3)
