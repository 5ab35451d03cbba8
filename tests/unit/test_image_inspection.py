"""Inspection of images by their bytes."""

from __future__ import annotations

import io
import struct
import time
import zlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from service.domain.errors import InvalidImage, UnsupportedMediaType
from service.domain.media import MAX_SEGMENTS, ImageInfo, inspect_image

ENCODINGS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "png": ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), {}),
    "jpeg": ("JPEG", ("L", "RGB", "CMYK"), {}),
    "progressive jpeg": ("JPEG", ("L", "RGB"), {"progressive": True, "quality": 95}),
    "jpeg with restarts": ("JPEG", ("RGB",), {"restart_marker_blocks": 1}),
    "webp": ("WEBP", ("RGB",), {}),
    "webp with transparency": ("WEBP", ("RGBA",), {}),
    "lossless webp": ("WEBP", ("RGB", "RGBA"), {"lossless": True}),
    "animated webp": ("WEBP", ("RGB", "RGBA"), {"save_all": True}),
}


def encode(picture: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def make_noise(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Make an image that does not compress to nothing."""
    grey = Image.frombytes("L", (width, height), _random_bytes(width * height, seed))
    return grey.convert(mode)


def _random_bytes(count: int, seed: int) -> bytes:
    state, content = seed * 2 + 1, bytearray()
    for _ in range(count):
        state = state * 1_103_515_245 + 12_345 & 0x7FFFFFFF
        content.append(state >> 16 & 0xFF)
    return bytes(content)


@st.composite
def images(draw: st.DrawFn) -> bytes:
    """Generate valid files in the three formats, with the options of ordinary software."""
    file_format, modes, options = ENCODINGS[draw(st.sampled_from(sorted(ENCODINGS)))]
    size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    picture = make_noise(draw(st.sampled_from(modes)), *size, seed=draw(st.integers(0, 9)))
    options = dict(options)
    if options.get("save_all"):
        options["append_images"] = [make_noise("RGB", *size, seed=77)]
    if draw(st.booleans()):
        exif = Image.Exif()
        exif[0x010E] = "a picture"
        options["exif"] = exif
    return encode(picture, file_format, **options)


def inspect_outcome(data: bytes) -> ImageInfo | type[Exception]:
    """Return the result of the inspection, or the class of the expected error."""
    try:
        return inspect_image(data)
    except (InvalidImage, UnsupportedMediaType) as error:
        return type(error)


@given(images())
def test_type_and_size_agree_with_pillow(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as picture:
        expected = ImageInfo(Image.MIME[picture.format or ""], *picture.size)
    assert inspect_image(data) == expected


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(images())
def test_every_proper_prefix_is_refused(data: bytes) -> None:
    view = memoryview(data)
    accepted = [size for size in range(len(data)) if isinstance(inspect_outcome(bytes(view[:size])), ImageInfo)]
    assert accepted == []


@given(images(), st.binary(max_size=64))
def test_trailing_bytes_are_ignored(data: bytes, garbage: bytes) -> None:
    assert inspect_image(data + garbage) == inspect_image(data)


@given(images(), st.data())
def test_mutations_raise_only_image_errors(data: bytes, draw: st.DataObject) -> None:
    mutated = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(data) - 1))
        mutated[at : at + draw.draw(st.integers(0, 3))] = draw.draw(st.binary(max_size=3))
    inspect_outcome(bytes(mutated))


@given(st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x40\0\0\0WEBP", b"RIFF"]), st.binary())
def test_random_bytes_raise_only_image_errors(start: bytes, rest: bytes) -> None:
    inspect_outcome(start + rest)


def test_thumbnail_end_is_not_the_image_end() -> None:
    thumbnail = encode(make_noise("RGB", 16, 16, 1), "JPEG")
    whole = encode(make_noise("RGB", 32, 32, 2), "JPEG", exif=b"Exif\0\0" + thumbnail)
    end = whole.index(thumbnail) + len(thumbnail)
    assert inspect_image(whole) == ImageInfo("image/jpeg", 32, 32)
    with pytest.raises(InvalidImage, match="cut off"):
        inspect_image(whole[: end + 200])


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
TABLE = b"\xff\xdb\x00\x43\x00" + b"\x01" * 64
FRAME = TABLE + b"\xff\xc0\x00\x0b\x08\x00\x05\x00\x07\x01\x01\x11\x00"
SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00scan"
VP8L = b"VP8L", b"\x2f\0\0\0\0\0"


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


def frame(marker: int = 0xC0, bits: int = 8, width: int = 7, components: bytes = b"\x01\x11\x00") -> bytes:
    content = struct.pack(">BHHB", bits, 5, width, len(components) // 3) + components
    return TABLE + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def scan(content: bytes) -> bytes:
    return b"\xff\xda" + struct.pack(">H", len(content) + 2) + content + b"scan"


def jpeg(*segments: bytes) -> bytes:
    return b"\xff\xd8" + b"".join(segments) + b"\xff\xd9"


def png_header(depth: int, colour: int, *methods: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">II5B", 3, 3, depth, colour, *(methods or (0, 0, 0)))


def fctl(width: int, height: int, left: int, top: int) -> tuple[bytes, bytes]:
    return b"fcTL", struct.pack(">5IHHBB", 0, width, height, left, top, 1, 10, 0, 0)


UNREADABLE = {
    "a depth that the colours do not have": png(png_header(3, 2), PIXELS, END),
    "no such colours": png(png_header(8, 5), PIXELS, END),
    "no such filters": png(png_header(8, 2, 0, 1, 0), PIXELS, END),
    "no such interlacing": png(png_header(8, 2, 0, 0, 2), PIXELS, END),
    "a size beyond PNG": png(header(2**31, 1), PIXELS, END),
    "two headers": png(header(3, 3), header(2, 2), PIXELS, END),
    "two equal headers": png(header(3, 3), header(3, 3), PIXELS, END),
    "a frame beside the image": png(header(3, 3), fctl(3, 3, 1, 0), PIXELS, END),
    "a frame larger than the image": png(header(3, 3), PIXELS, fctl(300, 300, 0, 0), END),
    "pixels of no sense": png(header(3, 3), (b"IDAT", b"1234"), END),
    "pixels of no filter": png(header(3, 3), (b"IDAT", zlib.compress(b"\x07" * 30)), END),
    "only empty pixels": png(header(3, 3), (b"IDAT", b""), END),
    "no chunk": png(header(3, 3), PIXELS, (b"\0\0\0\0", b""), END),
    "two frames": jpeg(frame(), frame(width=700), SCAN),
    "two equal frames": jpeg(frame(), SCAN, frame()),
    "a frame in twelve bits": jpeg(frame(bits=12), SCAN),
    "a hierarchical frame": jpeg(frame(0xC5), SCAN),
    "an arithmetic lossless frame": jpeg(frame(0xCB), SCAN),
    "two components": jpeg(frame(components=b"\x01\x11\x00\x02\x11\x00"), SCAN),
    "a component of no size": jpeg(frame(components=b"\x01\x10\x00"), SCAN),
    "a table that is missing": jpeg(frame(components=b"\x01\x11\x01"), SCAN),
    "a frame that is too wide": jpeg(frame(width=65_501), SCAN),
    "too large an unit": jpeg(
        frame(components=b"\x01\x44\x00\x02\x11\x00\x03\x11\x00"), scan(b"\x03\x01\x00\x02\x00\x03\x00\x00\x3f\x00")
    ),
    "a scan of another component": jpeg(frame(), scan(b"\x01\x02\x00\x00\x3f\x00")),
    "a scan with a code that can't be": jpeg(frame(), scan(b"\x01\x01\x04\x00\x3f\x00")),
    "a scan of nothing": jpeg(frame(), scan(b"\x00\x00\x3f\x00")),
    "a scan without a header": jpeg(frame(), scan(b"")),
    "a scan that is not progressive": jpeg(frame(0xC2), SCAN),
    "a scan without a predictor": jpeg(frame(0xC3), SCAN),
    "two heights": jpeg(frame(), SCAN, b"\xff\xdc\x00\x04\x01\x00"),
    "a height that follows": jpeg(
        frame().replace(b"\x00\x05\x00\x07", b"\x00\x00\x00\x07"), SCAN, b"\xff\xdc\x00\x04\0\5"
    ),
    "a canvas larger than the picture": webp(vp8x(9, 9), vp8l(8, 9)),
    "a canvas smaller than the picture": webp(vp8x(1, 1), vp8l(800, 900)),
    "a second picture that is larger": webp(vp8x(8, 9), vp8l(8, 9), vp8l(800, 900)),
    "a canvas of too many pixels": webp(vp8x(2**24, 2**9), vp8l(1, 1)),
    "a longer canvas": webp((b"VP8X", b"\0" * 12), vp8l(1, 1)),
    "lossless pixels of no version": webp((b"VP8L", b"\x2f\0\0\0\x20\0")),
    "pixels that are no key frame": webp((b"VP8 ", b"\x11\0\0\x9d\x01\x2a\5\0\5\0")),
    "pixels that are not shown": webp((b"VP8 ", b"\0\0\0\x9d\x01\x2a\5\0\5\0")),
    "pixels of no profile": webp((b"VP8 ", b"\x18\0\0\x9d\x01\x2a\5\0\5\0")),
    "pixels that end too early": webp((b"VP8 ", b"\x50\1\0\x9d\x01\x2a\5\0\5\0")),
    "a frame beside the canvas": animated(anmf(2, 0, 7, 8, vp8l(7, 8))),
    "a later frame beside the canvas": animated(anmf(0, 0, 8, 8, vp8l(8, 8)), anmf(0, 2, 8, 8, vp8l(8, 8))),
    "a frame of other pixels": animated(anmf(0, 0, 8, 8, vp8l(80, 80))),
    "a frame without pixels": animated(anmf(0, 0, 8, 8, (b"ALPH", b""))),
    "a frame without a header": animated((b"ANMF", b"\0" * 15)),
    "an animation without frames": animated(),
    "an animation of a kind to come": webp(vp8x(8, 8, 0x82), (b"ANIM", b"\0" * 6), anmf(0, 0, 8, 8, vp8l(8, 8))),
    "an animation of one picture": animated(vp8l(8, 8)),
    "frames of no animation": webp(vp8x(8, 8), (b"ANIM", b"\0" * 6), anmf(0, 0, 8, 8, vp8l(8, 8))),
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_undecodable_headers_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidImage):
        inspect_image(data)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (png(header(3, 3), fctl(2, 2, 1, 1), (b"IDAT", b""), PIXELS, (b"IDAT", b"more"), END), (3, 3)),
        (jpeg(frame(), SCAN, b"\xff\xdc\x00\x04\x00\x05"), (7, 5)),
        (jpeg(frame(0xC3), scan(b"\x01\x01\x00\x01\x00\x00")), (7, 5)),
        (animated(anmf(2, 4, 6, 4, (b"ALPH", b"xx"), vp8l(6, 4)), anmf(0, 0, 1, 1, vp8l(1, 1))), (8, 8)),
        (webp(vp8l(5, 7), vp8l(500, 700)), (5, 7)),
    ],
    ids=["png animation", "same height", "lossless jpeg", "webp animation", "after a plain webp"],
)
def test_consistent_repeated_headers_are_accepted(data: bytes, size: tuple[int, int]) -> None:
    info = inspect_image(data)
    assert (info.width, info.height) == size


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (png(header(3, 3), PIXELS, END, checksum=1), "checksum"),
        (png(PIXELS, header(3, 3), END, END), "begin with its header"),
        (png(header(0, 3), PIXELS, END), "0 x 3"),
        (png(header(3, 3), END, END), "no pixels"),
        (png(header(3, 3), PIXELS), "cut off"),
        (png(header(3, 3), PIXELS, END)[:-1], "cut off"),
        (png(header(3, 3), PIXELS, (b"IEND", b"long"))[:-4], "cut off"),
        (png(header(3, 3)), "cut off"),
        (b"\xff\xd8\xff\xd9", "ends before its pixels"),
        (b"\xff\xd8" + FRAME + b"\xff\xd9", "ends before its pixels"),
        (b"\xff\xd8" + SCAN + b"\xff\xd9", "before the header of their frame"),
        (b"\xff\xd8" + FRAME.replace(b"\x00\x05\x00\x07", b"\x00\x00\x00\x07") + SCAN + b"\xff\xd9", "7 x 0"),
        (b"\xff\xd8\xff\xc0\x00\x04\x08\x00" + TABLE + SCAN + b"\xff\xd9", "too short"),
        (b"\xff\xd8" + FRAME + SCAN, "cut off"),
        (b"\xff\xd8" + FRAME + SCAN + b"\xff", "cut off"),
        (b"\xff\xd8" + FRAME + SCAN + b"\xff\xda\x00", "cut off"),
        (webp((b"VP8X", b"\0" * 10), (b"EXIF", b"1234")), "no pixels"),
        (webp((b"VP8X", b"\0" * 9)), "begin with its header"),
        (webp((b"EXIF", b"1234"), (b"VP8L", b"\x2f\0\0\0\0\0")), "begin with its header"),
        (webp((b"VP8 ", b"\x10\0\0\x9d\x01\x2a\0\0\x05\0")), "0 x 5"),
        (webp(VP8L)[:-1], "cut off"),
        (webp((b"VP8X", b"\0" * 10), (b"VP8L", b"\x2f\0\0\0\0\0")).replace(b"VP8L\x06", b"VP8L\x08"), "cut off"),
    ],
)
def test_broken_image_error_names_the_reason(data: bytes, why: str) -> None:
    with pytest.raises(InvalidImage, match=why):
        inspect_image(data)


def test_harmless_stray_bytes_are_accepted() -> None:
    image = b"\xff\xd8\xff\xff\x00rubbish" + FRAME + b"\xff\xff" + SCAN + b"\xff\x00\xff\xd0\xff\x37\xff\xff\xd9"
    assert inspect_image(image) == ImageInfo("image/jpeg", 7, 5)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (webp((b"VP8 ", b"\x10\0\0\x9d\x01\x2a\x05\x40\x07\x80")), (5, 7)),
        (
            webp((b"VP8X", b"\0\0\0\0\x04\0\0\x06\0\0"), (b"ICCP", b"odd\0"), vp8l(5, 7)).replace(
                b"\x04\0\0\0odd", b"\x03\0\0\0odd"
            ),
            (5, 7),
        ),
    ],
    ids=["scaled", "odd profile"],
)
def test_webp_details(data: bytes, size: tuple[int, int]) -> None:
    """Hints on scaling are not part of the size; chunks of odd length are padded."""
    assert inspect_image(data) == ImageInfo("image/webp", *size)


def _ftyp(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0" * 12


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encode(make_noise("L", 3, 3, 1), "GIF"), "GIF"),
        (encode(make_noise("L", 3, 3, 1), "BMP"), "not known"),
        (encode(make_noise("L", 3, 3, 1), "TIFF"), "not known"),
        (encode(make_noise("L", 16, 16, 1), "ICO"), "not known"),
        (encode(make_noise("RGB", 3, 3, 1), "JPEG2000"), "not known"),
        (encode(make_noise("RGB", 16, 16, 1), "AVIF"), "not known"),
        (encode(make_noise("L", 3, 3, 1), "PDF"), "PDF"),
        (_ftyp(b"heic"), "HEIC"),
        (b"\xff\x0a1234", "not known"),
        (b"8BPS1234", "not known"),
        (b"PK\x03\x04", "not known"),
        (b'\xef\xbb\xbf\n <svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"<?xml version='1.0'?>", "XML"),
        (b"RIFF\0\0\0\0WAVE", "not known"),
        (b"iVBORw0KGgo", "not known"),
    ],
)
def test_unsupported_type_error_names_both_types(data: bytes, name: str) -> None:
    with pytest.raises(UnsupportedMediaType, match=rf"{name}.*send a PNG, JPEG or WebP"):
        inspect_image(data)


@pytest.mark.parametrize(
    ("start", "piece", "end", "others"),
    [
        (b"\xff\xd8" + FRAME + SCAN, b"\xff\xfe\x00\x02", b"\xff\xd9", 4),
        (webp(vp8x(1, 1)), b"ABCD\0\0\0\0", VP8L[0] + b"\6\0\0\0" + VP8L[1], 2),
    ],
    ids=["jpeg", "webp"],
)
def test_segment_limit(start: bytes, piece: bytes, end: bytes, others: int) -> None:
    def image(pieces: int) -> bytes:
        data = start + piece * (pieces - others) + end
        return data[:4] + struct.pack("<I", len(data) - 8) + data[8:] if data.startswith(b"RIFF") else data

    assert isinstance(inspect_image(image(MAX_SEGMENTS)), ImageInfo)
    with pytest.raises(InvalidImage, match="more than 10000 pieces"):
        inspect_image(image(MAX_SEGMENTS + 1))


def test_png_chunks_are_unlimited() -> None:
    """Encoders split the pixels into chunks as small as they like."""
    whole = encode(make_noise("RGB", 80, 80, 1), "PNG")
    at = whole.index(b"IDAT") + 4
    pixels = whole[at : at + struct.unpack(">I", whole[at - 8 : at - 4])[0]]
    split = png(header(80, 80), *((b"IDAT", pixels[number : number + 1]) for number in range(len(pixels))), END)
    assert split.count(b"IDAT") > 10_000
    with Image.open(io.BytesIO(split)) as picture:
        picture.load()
    assert inspect_image(split) == ImageInfo("image/png", 80, 80)


def test_jpeg_marker_after_a_long_scan() -> None:
    for length in range(1024 * 1024 - 8, 1024 * 1024 + 2):
        assert inspect_image(b"\xff\xd8" + FRAME + SCAN + b"x" * length + b"\xff\xd9").width == 7


SEGMENTS = 200_000


@pytest.mark.parametrize(
    "data",
    [
        png(header(3, 3)) + b"\0\0\0\0tEXtsum." * SEGMENTS,
        b"\xff\xd8" + b"\xff\xfe\x00\x02" * SEGMENTS,
        b"\xff\xd8" + b"\xff\xff" * SEGMENTS,
        b"\xff\xd8" + b"\xff\x00" * SEGMENTS,
        webp((b"VP8X", b"\0" * 10), *[(b"ABCD", b"")] * SEGMENTS),
        png(header(3, 3), *[(b"IDAT", b"")] * SEGMENTS),
    ],
    ids=["png chunks", "jpeg comments", "jpeg fill", "jpeg stuffing", "webp chunks", "empty pixels"],
)
def test_inspection_is_linear(data: bytes) -> None:
    """Anything quadratic would take hours."""
    before = time.process_time()
    inspect_outcome(data)
    assert time.process_time() - before < 10
