"""The imaging operations: each result has the properties of its kind."""

from __future__ import annotations

import io
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageFilter

from service.sandbox import imaging
from service.sandbox.faults import Kind
from service.sandbox.forms import Options, RejectedError
from service.sandbox.imaging import apply_operation
from tests.support.images import make_png

RED, WHITE, BLUE = (200, 30, 40), (255, 255, 255), (20, 60, 180)
PATH = "{http://www.w3.org/2000/svg}path"
Pixels = npt.NDArray[np.int_]


def encode_image(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def draw_logo() -> Image.Image:
    """Draw three flat colours with smooth edges: a disc and a bar on white."""
    image = Image.new("RGB", (1280, 960), WHITE)
    drawing = ImageDraw.Draw(image)
    drawing.ellipse((120, 160, 760, 800), RED)
    drawing.rectangle((800, 240, 1160, 720), BLUE)
    return image.reduce(4)


def draw_scene(height: int = 240, width: int = 320) -> Image.Image:
    """Draw a colour gradient with soft texture, whose opposite edges differ."""
    noise = np.random.default_rng(3).normal(128, 60, (height, width)).clip(0, 255).astype(np.uint8)
    texture = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))).astype(float) - 128
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    slope = np.dstack((255 * (1 - across), 120 + 100 * down, 255 * across))
    return Image.fromarray(np.clip(slope + 3 * texture[:, :, np.newaxis], 0, 255).astype(np.uint8))


def draw_face() -> Image.Image:
    """Draw a face in even light on a plain wall, with grain."""
    image = Image.new("RGB", (800, 600), (120, 140, 150))
    drawing = ImageDraw.Draw(image)
    drawing.ellipse((292, 172, 468, 408), (225, 180, 150))
    drawing.ellipse((346, 353, 414, 375), (160, 75, 80))
    for x in (345, 415):
        drawing.ellipse((x - 24, 257, x + 24, 287), (165, 120, 95))
        drawing.ellipse((x - 8, 264, x + 8, 280), (45, 40, 40))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(2.5)))
    grain = np.random.default_rng(1).normal(0, 5, pixels.shape)
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def run_operation(kind: Kind, options: Options, image: bytes, folder: Path) -> dict[str, Path]:
    """Run an operation and return its results by name."""
    (folder / "input").write_bytes(image)
    return {path.name: path for path in apply_operation(kind, options, folder / "input", folder)}


def to_array(image: Image.Image) -> Pixels:
    return np.asarray(image).astype(int)


def read_image(path: Path) -> Pixels:
    with Image.open(path) as image:
        return to_array(image)


def sharpness(image: Image.Image) -> float:
    grey = to_array(image.convert("L"))
    return float((4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]).var())


def mean_difference(first: Pixels, second: Pixels) -> float:
    return float(np.abs(first - second).mean())


def test_upscaled_image_equals_the_original_when_scaled_down(tmp_path: Path) -> None:
    scene = draw_scene()
    for factor in (1.5, 4):
        large = imaging.upscale(scene, Options(upscale=factor))
        assert large.size == (round(320 * factor), round(240 * factor))
        small = large.resize((320, 240), Image.Resampling.BOX)
        assert mean_difference(to_array(small), to_array(scene)) < 8
    with pytest.raises(RejectedError, match="像素过大"):
        run_operation("upscale", Options(upscale=8), make_png(700, 700), tmp_path)


def test_steps_sharpen_noise_smooths_and_inpainting_changes() -> None:
    logo, scene = draw_logo(), draw_scene()
    stretched = logo.resize((960, 720), Image.Resampling.LANCZOS)
    few, many = (imaging.upscale(logo, Options(upscale=3, steps=steps)) for steps in (20, 40))
    assert sharpness(stretched) < sharpness(few) < sharpness(many)
    grain = Image.fromarray(np.random.default_rng(2).normal(128, 6, (120, 120, 3)).astype(np.uint8))
    noises = [Options(s_noise=1.1), Options(s_noise=1.0), Options(high_fidelity=True)]
    strong, weak, none = (to_array(imaging.upscale(grain, options)).std() for options in noises)
    assert strong < weak < none
    plain = to_array(imaging.upscale(scene, Options()))
    half, full = (
        to_array(imaging.upscale(scene, Options(strong_inpaint=True, strong_inpaint_intensity=share)))
        for share in (0.3, 1)
    )
    assert 0 < mean_difference(half, plain) < mean_difference(full, plain)


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


def test_palette_of_a_picture_with_a_transparent_background_has_only_its_own_colours() -> None:
    image = Image.new("RGBA", (60, 40), (0, 255, 0, 0))
    image.paste(RED, (10, 10, 30, 30))
    image.paste(BLUE, (30, 10, 50, 30))
    flat = imaging.reduce_colors(image, 2)
    colours = {colour[:3] for _, colour in flat.getcolors() or () if isinstance(colour, tuple) and colour[3]}
    assert len(colours) == 2
    for colour in (RED, BLUE):
        assert any(max(abs(a - b) for a, b in zip(other, colour, strict=True)) < 16 for other in colours)


def test_opposite_edges_of_a_tile_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = draw_scene()
    scene = to_array(image)
    inside = np.mean([mean_difference(scene[:, x], scene[:, x + 1]) for x in range(100, 200)])
    for fit in (0.1, 0.9):
        tile = to_array(imaging.make_seamless(image, fit))
        assert tile.shape == scene.shape
        assert max(mean_difference(tile[:, 0], tile[:, -1]), mean_difference(tile[0], tile[-1])) < 2 * inside
        assert mean_difference(tile[120, 160], scene[120, 160]) <= 1
    results = run_operation("seamless", Options(), encode_image(image), tmp_path)
    tile, grid = (read_image(results[name]) for name in ("image.png", "grid.png"))
    assert np.array_equal(grid, np.block([[[tile], [tile]], [[tile], [tile]]]))
    monkeypatch.setattr(imaging, "_MAX_GRID_PIXELS", 10_000)
    assert imaging.make_grid(Image.new("RGB", (300, 300))).size == (100, 100)


def test_only_the_skin_of_a_face_is_smoothed() -> None:
    image = draw_face()
    skin = to_array(imaging.find_skin(image))
    assert skin[272, 345] > 200  # an eye, within the skin
    assert not skin[:100].any()
    restored, original = to_array(imaging.enhance_faces(image)), to_array(image)
    cheek = (slice(315, 335), slice(325, 345))
    assert restored[cheek].std(axis=(0, 1)).mean() < 0.8 * original[cheek].std(axis=(0, 1)).mean()
    assert np.array_equal(restored[:100], original[:100])
    grey = draw_scene().convert("L").convert("RGB")
    assert not to_array(imaging.find_skin(grey)).any()
    assert 0 < mean_difference(to_array(imaging.enhance_faces(grey)), to_array(grey)) < 10


def test_common_formats_keep_their_size(tmp_path: Path) -> None:
    for mode, suffix in (("RGBA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("1", "PNG"), ("RGB", "WEBP"), ("L", "TIFF")):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), RED).convert(mode).save(buffer, suffix)
        results = run_operation("seamless", Options(), buffer.getvalue(), tmp_path)
        assert read_image(results["image.png"]).shape[:2] == (30, 40)
    kinds: list[Kind] = ["upscale", "vector", "face", "seamless"]
    transparent = Image.new("RGBA", (40, 40))
    transparent.paste("white", (10, 10, 30, 30))
    for kind in kinds:
        results = run_operation(kind, Options(), encode_image(transparent), tmp_path)
        alpha = read_image(results["image.png"])[:, :, 3]
        assert (alpha.min(), alpha.max()) == (0, 255)
        assert run_operation(kind, Options(), encode_image(transparent.crop((0, 0, 1, 1))), tmp_path)


def test_16_bit_grey_and_orientation_in_exif(tmp_path: Path) -> None:
    shades = np.tile(np.linspace(0, 65535, 64, dtype=np.uint16), (64, 1))
    image = encode_image(Image.fromarray(shades))
    result = run_operation("upscale", Options(high_fidelity=True), image, tmp_path)["image.png"]
    assert np.abs(read_image(result)[32, :, 0] - (shades[32] >> 8)).max() < 10
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "JPEG", exif=exif)
    result = run_operation("upscale", Options(), buffer.getvalue(), tmp_path)["image.png"]
    assert read_image(result).shape == (40, 30, 3)
