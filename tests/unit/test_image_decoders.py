"""Inspection agrees with decoders on altered headers."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import cv2
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from service.domain.errors import InvalidImage
from service.domain.media import inspect_image
from tests.unit.test_image_inspection import encode, make_noise

SIZE = (21, 14)
OPTIONS = {
    "PNG": ({}, {"interlace": 1}),
    "JPEG": ({}, {"progressive": True}, {"subsampling": 0}),
    "WEBP": (
        {},
        {"lossless": True},
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"},
        {"lossless": True, "save_all": True},
    ),
}
MODES = {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK"), "WEBP": ("RGB", "RGBA")}

Size = tuple[int, int]


def inspected_size(data: bytes) -> Size | None:
    try:
        info = inspect_image(data)
    except InvalidImage:
        return None
    return info.width, info.height


def decoded_sizes(data: bytes) -> tuple[Size | None, Size | None]:
    """Return the sizes decoded by Pillow and OpenCV, None where they refuse."""
    with_pillow: Size | None = None
    with contextlib.suppress(OSError, SyntaxError, ValueError), Image.open(io.BytesIO(data)) as picture:
        picture.load()
        with_pillow = picture.size
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return with_pillow, None if pixels is None else (pixels.shape[1], pixels.shape[0])


def header_offsets(data: bytes | bytearray) -> list[int]:
    """Return header offsets that decide coding and size, except those that would make the image huge."""
    if data.startswith(b"\x89PNG"):
        return [19, 23, 24, 25, 27]
    if data.startswith(b"\xff\xd8"):
        frame, scan = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")), data.index(b"\xff\xda")
        parts, scanned = data[frame + 9], data[scan + 4]
        of_frame = (frame + 1, frame + 4, frame + 6, *range(frame + 8, frame + 10 + 3 * parts))
        return [*of_frame, scan + 4, *range(scan + 5, scan + 5 + 2 * scanned, 2)]
    offsets = [20, 24, 27] if data[12:16] == b"VP8X" else []
    for kind, coded in ((b"VP8 ", (3, 4, 5, 6, 8)), (b"VP8L", (0, 1, 4))):
        if b"ANMF" not in data and (at := data.find(kind)) > 0:
            offsets += [at + 8 + item for item in coded]
    return offsets


@st.composite
def altered_images(draw: st.DrawFn) -> bytes:
    """Generate a valid file with up to two altered header bytes."""
    form = draw(st.sampled_from(sorted(MODES)))
    options = dict(draw(st.sampled_from(OPTIONS[form])))
    picture = make_noise(draw(st.sampled_from(MODES[form])), *SIZE, seed=draw(st.integers(0, 3)))
    if options.get("save_all"):
        options["append_images"] = [make_noise("RGB", *SIZE, seed=9)]
    data = bytearray(encode(picture, form, **options))
    for at in draw(st.lists(st.sampled_from(header_offsets(data)), max_size=2)):
        data[at] = draw(st.integers(0, 255))
    if form == "PNG":
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(altered_images())
def test_inspection_agrees_with_decoders(data: bytes) -> None:
    inspected, sizes = inspected_size(data), decoded_sizes(data)
    assert {size for size in sizes if size} <= {inspected}
    # Where a PNG or JPEG declares another coding of its pixels, only decoding all of them proves it wrong.
    if inspected == SIZE and data.startswith(b"RIFF"):
        assert any(sizes)
