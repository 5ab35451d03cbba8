"""The demo's images suit their kinds."""

from importlib import resources

import cv2
import numpy as np
import pytest
from cv2.data import haarcascades
from PIL import Image

from service.demo.run import JOBS, Job
from service.demo.verify import MAX_SEAM, open_image, seam_strength

IMAGES = resources.files("service.demo") / "images"


def open_example(name: str) -> Image.Image:
    return open_image((IMAGES / name).read_bytes())


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.kind)
def test_small(job: Job) -> None:
    """Each image is below 120 KB, to keep the demo fast and the package small."""
    assert len(job.read_image()) < 120_000


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.kind)
def test_origin(job: Job) -> None:
    """Every image has its origin and licence documented."""
    text = (IMAGES / "IMAGES.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith(f"| `{job.image_name}`")]
    assert [f"`{job.kind}`" in line and ("CC0" in line or "public domain" in line) for line in lines] == [True]


def test_face() -> None:
    """OpenCV's frontal cascade finds exactly one face in the portrait."""
    cascade = cv2.CascadeClassifier(haarcascades + "haarcascade_frontalface_default.xml")
    grey = np.asarray(open_example("face.jpg").convert("L"))
    assert len(cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=5)) == 1


def test_logo() -> None:
    """Five colours cover the logo except for smoothed edges."""
    logo = open_example("logo.png").convert("RGB")
    counts = sorted((count for count, _ in logo.getcolors() or []), reverse=True)
    assert sum(counts[:5]) / (logo.width * logo.height) > 0.98
    assert len(counts) <= 32


def test_texture() -> None:
    """The texture does not tile by itself: its seam is far above the demo's limit."""
    assert seam_strength(open_example("texture.jpg")) > 2 * MAX_SEAM


def test_photo() -> None:
    assert len(open_example("photo.jpg").getcolors(maxcolors=1 << 24) or []) > 10_000


def test_nothing_else() -> None:
    """Only images in use and their description are shipped."""
    assert {item.name for item in IMAGES.iterdir()} == {job.image_name for job in JOBS} | {"IMAGES.md"}
