"""Inspection of images by their bytes, and detection of media types."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Any
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from service.domain.errors import InvalidImage, UnsupportedMediaType
from service.domain.media import (
    JPEG,
    MAX_SEGMENTS,
    OCTET_STREAM,
    PNG,
    SNIFF_BYTES,
    SVG,
    WEBP,
    ImageInfo,
    inspect_image,
    sniff_type,
)

ENCODINGS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "png": ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), {}),
    "interlaced png": ("PNG", ("RGB",), {"interlace": 1}),
    "jpeg": ("JPEG", ("L", "RGB", "CMYK"), {}),
    "progressive jpeg": ("JPEG", ("L", "RGB"), {"progressive": True, "quality": 95}),
    "jpeg without subsampling": ("JPEG", ("RGB",), {"subsampling": 0}),
    "jpeg with restarts": ("JPEG", ("RGB",), {"restart_marker_blocks": 1}),
    "webp": ("WEBP", ("RGB", "RGBA"), {}),
    "lossless webp": ("WEBP", ("RGB", "RGBA"), {"lossless": True}),
    "animated webp": ("WEBP", ("RGB", "RGBA"), {"save_all": True}),
}
SIDES = st.integers(1, 40)


def encode(picture: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def make_noise(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Make an image that does not compress to nothing."""
    grey = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    return Image.fromarray(grey).convert(mode)


THUMBNAIL = encode(make_noise("L", 4, 4, 1), "JPEG")


@st.composite
def images(draw: st.DrawFn, sides: st.SearchStrategy[int] = SIDES) -> bytes:
    """Generate valid files in the three formats, with the options of ordinary software."""
    file_format, modes, options = ENCODINGS[draw(st.sampled_from(sorted(ENCODINGS)))]
    size = draw(sides), draw(sides)
    picture = make_noise(draw(st.sampled_from(modes)), *size, seed=draw(st.integers(0, 9)))
    options = dict(options)
    if options.get("save_all"):
        options["append_images"] = [make_noise("RGB", *size, seed=77)]
    if draw(st.booleans()):
        options["exif"] = b"Exif\0\0" + THUMBNAIL  # whose end is not that of the image
    return encode(picture, file_format, **options)


def inspect_size(data: bytes) -> tuple[int, int] | None:
    """Return the size by the inspection, None for an error in the image."""
    try:
        info = inspect_image(data)
    except (InvalidImage, UnsupportedMediaType):
        return None
    return info.width, info.height


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(images(), st.binary(max_size=64))
def test_type_and_size_agree_with_pillow_and_no_prefix_is_accepted(data: bytes, garbage: bytes) -> None:
    with Image.open(io.BytesIO(data)) as picture:
        expected = ImageInfo(Image.MIME[picture.format or ""], *picture.size)
    assert inspect_image(data) == inspect_image(data + garbage) == expected
    assert [size for size in range(len(data)) if inspect_size(data[:size])] == []


@given(images(), st.binary(), st.data())
def test_other_bytes_raise_only_image_errors(data: bytes, rest: bytes, draw: st.DataObject) -> None:
    for start in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x40\0\0\0WEBP"):
        inspect_size(start + rest)
    at = draw.draw(st.integers(0, len(data) - 1))
    inspect_size(data[:at] + draw.draw(st.binary(max_size=3)) + data[at + draw.draw(st.integers(0, 3)) :])


def decode_sizes(data: bytes) -> list[tuple[int, int] | None]:
    """Return the sizes decoded by Pillow and OpenCV, None where they refuse."""
    with_pillow = None
    with contextlib.suppress(OSError, SyntaxError, ValueError), Image.open(io.BytesIO(data)) as picture:
        picture.load()
        with_pillow = picture.size
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return [with_pillow, None if pixels is None else (pixels.shape[1], pixels.shape[0])]


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


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(images(st.just(21)), st.data())
def test_inspection_agrees_with_decoders_on_altered_headers(data: bytes, draw: st.DataObject) -> None:
    altered = bytearray(data)
    for at in draw.draw(st.lists(st.sampled_from(header_offsets(altered)), max_size=2)):
        altered[at] = draw.draw(st.integers(0, 255))
    if altered.startswith(b"\x89PNG"):
        altered[29:33] = struct.pack(">I", zlib.crc32(altered[12:29]))
    inspected, sizes = inspect_size(bytes(altered)), decode_sizes(bytes(altered))
    assert {size for size in sizes if size} <= {inspected}
    # Where a PNG or JPEG declares another coding of its pixels, only decoding all of them proves it wrong.
    if inspected == (21, 21) and altered.startswith(b"RIFF"):
        assert any(sizes)


def png(*chunks: tuple[bytes, bytes], checksum: int = 0) -> bytes:
    """Assemble a PNG of these chunks; `checksum` is added to each checksum."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ checksum)
        for kind, content in chunks
    )


def header(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


PIXELS = b"IDAT", zlib.compress(b"\0" * 30)
END = b"IEND", b""
SIZE = b"\x00\x05\x00\x07"
TABLE = b"\xff\xdb\x00\x43\x00" + b"\x01" * 64
FRAME = TABLE + b"\xff\xc0\x00\x0b\x08" + SIZE + b"\x01\x01\x11\x00"
SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00scan"


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(content)) + content for kind, content in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def vp8l(width: int, height: int) -> tuple[bytes, bytes]:
    return b"VP8L", b"\x2f" + (width - 1 | height - 1 << 14).to_bytes(4, "little") + b"\0"


def vp8x(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    return b"VP8X", bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


def anmf(left: int, top: int, width: int, height: int, *chunks: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    head = b"".join(item.to_bytes(3, "little") for item in (left // 2, top // 2, width - 1, height - 1, 100))
    return b"ANMF", head + b"\0" + webp(*chunks)[12:]


def animated(*chunks: tuple[bytes, bytes]) -> bytes:
    """Assemble an animated WebP of 8 x 8 pixels."""
    return webp(vp8x(8, 8, 2), (b"ANIM", b"\0" * 6), *chunks)


def jpeg(*segments: bytes) -> bytes:
    return b"\xff\xd8" + b"".join(segments) + b"\xff\xd9"


def fctl(width: int, height: int, left: int, top: int) -> tuple[bytes, bytes]:
    return b"fcTL", struct.pack(">5IHHBB", 0, width, height, left, top, 1, 10, 0, 0)


UNREADABLE = {
    "two headers": png(header(3, 3), header(2, 2), PIXELS, END),
    "a frame beside the image": png(header(3, 3), fctl(3, 3, 1, 0), PIXELS, END),
    "pixels of no sense": png(header(3, 3), (b"IDAT", b"1234"), END),
    "two frames": jpeg(FRAME, FRAME.replace(SIZE, b"\x00\x05\x02\xbc"), SCAN),
    "a frame in twelve bits": jpeg(FRAME.replace(b"\x0b\x08", b"\x0b\x0c"), SCAN),
    "a table that is missing": jpeg(FRAME.replace(b"\x01\x11\x00", b"\x01\x11\x01"), SCAN),
    "a frame that is too wide": jpeg(FRAME.replace(SIZE, b"\x00\x05\xff\xdd"), SCAN),
    "a scan of another component": jpeg(FRAME, SCAN.replace(b"\x01\x01", b"\x01\x02")),
    "two heights": jpeg(FRAME, SCAN, b"\xff\xdc\x00\x04\x01\x00"),
    "a canvas larger than the picture": webp(vp8x(9, 9), vp8l(8, 9)),
    "a second picture that is larger": webp(vp8x(8, 9), vp8l(8, 9), vp8l(800, 900)),
    "a canvas of too many pixels": webp(vp8x(2**24, 2**9), vp8l(1, 1)),
    "pixels that are no key frame": webp((b"VP8 ", b"\x11\0\0\x9d\x01\x2a\5\0\5\0")),
    "a frame beside the canvas": animated(anmf(2, 0, 7, 8, vp8l(7, 8))),
    "a frame of other pixels": animated(anmf(0, 0, 8, 8, vp8l(80, 80))),
    "an animation without frames": animated(),
    "a wrong checksum": png(header(3, 3), PIXELS, END, checksum=1),
    "pixels before the header": png(PIXELS, header(3, 3), END, END),
    "pixels before their frame": jpeg(SCAN),
    "no height": jpeg(FRAME.replace(SIZE, b"\x00\x00\x00\x07"), SCAN),
    "a canvas without pixels": webp((b"VP8X", b"\0" * 10), (b"EXIF", b"1234")),
    "a chunk beyond the end": webp((b"VP8X", b"\0" * 10), vp8l(1, 1)).replace(b"VP8L\x06", b"VP8L\x08"),
    # Anything quadratic would take hours.
    "png chunks": png(header(3, 3)) + b"\0\0\0\0tEXtsum." * 200_000,
    "empty pixels": png(header(3, 3)) + png((b"IDAT", b""))[8:] * 200_000,
    "jpeg comments": b"\xff\xd8" + b"\xff\xfe\x00\x02" * 200_000,
    "jpeg stuffing": b"\xff\xd8" + b"\xff\x00" * 200_000,
    "webp chunks": webp((b"VP8X", b"\0" * 10)) + b"ABCD\0\0\0\0" * 200_000,
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_broken_images_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidImage):
        inspect_image(data)


ODD = {
    "png animation": (png(header(3, 3), fctl(2, 2, 1, 1), (b"IDAT", b""), PIXELS, (b"IDAT", b"more"), END), (3, 3)),
    "stray bytes": (jpeg(b"\xff\xff\x00rubbish", FRAME, b"\xff\xff", SCAN, b"\xff\x00\xff\xd0\xff\x37\xff"), (7, 5)),
    "webp animation": (animated(anmf(2, 4, 6, 4, (b"ALPH", b"xx"), vp8l(6, 4)), anmf(0, 0, 1, 1, vp8l(1, 1))), (8, 8)),
    "a padded chunk": (
        webp(vp8x(5, 7), (b"ICCP", b"odd\0"), vp8l(5, 7)).replace(b"\x04\0\0\0odd", b"\x03\0\0\0odd"),
        (5, 7),
    ),
    # Encoders split the pixels into chunks as small as they like.
    "many png chunks": (png(header(3, 3), *[(b"IDAT", b"")] * (MAX_SEGMENTS + 1), PIXELS, END), (3, 3)),
}


@pytest.mark.parametrize(("data", "size"), ODD.values(), ids=ODD)
def test_odd_images_are_accepted(data: bytes, size: tuple[int, int]) -> None:
    assert inspect_size(data) == size


@pytest.mark.parametrize("data", [b"\0\0\0\x18ftypheic" + b"\0" * 12, b"RIFF\0\0\0\0WAVE"], ids=["HEIC", "WAV"])
def test_other_formats_are_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedMediaType):
        inspect_image(data)


def test_segment_limit() -> None:
    for pieces, is_accepted in ((MAX_SEGMENTS, True), (MAX_SEGMENTS + 1, False)):
        data = b"\xff\xd8" + FRAME + SCAN + b"\xff\xfe\x00\x02" * (pieces - 4) + b"\xff\xd9"
        assert (inspect_size(data) is not None) is is_accepted


def test_long_inspections_pause() -> None:
    long_scan, tables = SCAN + b"\xff\x00" * 200_000, b"\xff\xdb\xff\xff" + bytes(65_533)
    frame = anmf(0, 0, 8, 8, *[(b"EXIF", b"")] * 99, vp8l(8, 8))
    for data, expected in (
        (jpeg(FRAME, long_scan), 0),
        (jpeg(FRAME, *[long_scan] * 20), 10),
        (jpeg(*[tables] * 100, FRAME, SCAN), 10),
        (animated(frame), 0),
        (animated(*[frame] * 100), 10),
    ):
        pause = Mock()
        inspect_image(data, pause)
        assert expected <= pause.call_count <= 2 * expected


def test_jpeg_marker_after_a_long_scan() -> None:
    for length in range(1024 * 1024 - 8, 1024 * 1024 + 2, 3):
        assert inspect_size(b"\xff\xd8" + FRAME + SCAN + b"x" * length + b"\xff\xd9") == (7, 5)


SVG_HEADS = [
    b"<svg/>",
    b"\xef\xbb\xbf<svg xmlns='http://www.w3.org/2000/svg'>",
    b"\n\t<?xml version='1.0'?>\n<!-- a > b --><!-- c --><svg >",
    b"<!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1//EN' 'x.dtd'><svg\n>",
    b"<!DOCTYPE svg [<!ENTITY a 'b'>]><svg:svg >",
]
OTHER_HEADS = [
    *(b"", b"<html><svg/></html>", b"<!DOCTYPE html><svg/>", b"<!-- <svg> -->", b"<svgx>", b"x<svg>", b"RIFF....WAVE"),
    # Backtracking in one of these would take for ever.
    *(text * (SNIFF_BYTES // len(text)) for text in (b"<!---->", b"<?a?>", b" ", b"<!DOCTYPE svg>", b"<!--")),
    b"<!DOCTYPE svg [" * 4_000,
]


def test_type_of_an_artifact_by_its_first_bytes() -> None:
    for form, media_type in (("PNG", PNG), ("JPEG", JPEG), ("WEBP", WEBP), ("GIF", OCTET_STREAM)):
        assert sniff_type(encode(make_noise("L", 4, 4, 1), form)) == media_type
    assert [head for head in SVG_HEADS if sniff_type(head) != SVG] == []
    assert [head for head in OTHER_HEADS if sniff_type(head) != OCTET_STREAM] == []
