"""Inspection of images and the types of artifacts."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from struct import Struct as Layout
from typing import NoReturn

from msgspec import Struct

from service.domain.errors import InvalidImage, UnsupportedMediaType
from service.domain.tasks import ArtifactName

PNG = "image/png"


JPEG = "image/jpeg"


WEBP = "image/webp"


MAX_SEGMENTS = 10_000
"""How many segments a JPEG, or chunks a WebP may consist of: ordinary software writes far fewer, whatever the size."""


class ImageInfo(Struct, frozen=True):
    """What an image is, and its size in pixels."""

    media_type: str
    width: int
    height: int


def inspect_image(data: bytes) -> ImageInfo:
    """Tell a PNG, JPEG or WebP image and its size.

    Raises UnsupportedMediaType for bytes that are neither, InvalidImage for one that is broken or cut off.
    """
    if not data:
        raise InvalidImage("The image is empty: send the bytes of a PNG, JPEG or WebP image.")
    if data.startswith(_PNG_SIGNATURE):
        return _inspect_png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _inspect_jpeg(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _inspect_webp(data)
    known = next((f"The file is {name}" for name, told in _OTHER_FORMATS if told(data)), "The file's type is not known")
    raise UnsupportedMediaType(f"{known}; send a PNG, JPEG or WebP image.")


def _image_info(media_type: str, width: int, height: int) -> ImageInfo:
    if width < 1 or height < 1:
        _raise_broken(media_type, f"it says its size is {width} x {height} pixels")
    return ImageInfo(media_type, width, height)


def _raise_broken(media_type: str, reason: str) -> NoReturn:
    raise InvalidImage(
        f"The {_FORMAT_NAMES[media_type]} image is broken: {reason}. Send the whole file, as it is on disk."
    )


def _raise_truncated(media_type: str) -> NoReturn:
    raise InvalidImage(f"The {_FORMAT_NAMES[media_type]} image is cut off: its end is missing. Send the whole file.")


def _raise_too_many_segments(media_type: str) -> NoReturn:
    _raise_broken(media_type, f"it consists of more than {MAX_SEGMENTS} pieces")


_FORMAT_NAMES = {PNG: "PNG", JPEG: "JPEG", WEBP: "WebP"}


# PNG: a signature, then chunks of length, type, content and checksum, from IHDR to IEND.

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


_PNG_CHUNK = Layout(">I4s")


_PNG_HEADER = Layout(">I4sIIBBBBBI")


_PNG_FRAME = 12
"""Bytes of a chunk beside its content."""


_PNG_DEPTHS = {0: {1, 2, 4, 8, 16}, 2: {8, 16}, 3: {1, 2, 4, 8}, 4: {8, 16}, 6: {8, 16}}
"""Bits of a sample, by colour type."""


_PNG_MAX_SIDE = 0x7FFFFFFF


_PNG_FILTERS = 5


_APNG_FRAME = Layout(">IIIII")


_CHUNKS_PER_YIELD = 1_000
"""After so many chunks other threads get a turn: an image may have millions, since encoders choose their size."""


def _inspect_png(data: bytes) -> ImageInfo:
    width, height = _read_png_size(data)
    pixels = False
    for kind, at, length in _iterate_png_chunks(data):
        if kind == b"IDAT":
            pixels = length > 0
            _check_png_pixels(data[at : at + min(length, 4_096)])
        elif kind == b"IHDR":
            _raise_broken(PNG, "it has two headers")
        elif length >= _APNG_FRAME.size:
            _, wide, high, left, top = _APNG_FRAME.unpack_from(data, at)
            if left + wide > width or top + high > height:
                _raise_broken(PNG, f"it has a frame that does not lie within its {width} x {height} pixels")
    if not pixels:
        _raise_broken(PNG, "it holds no pixels")
    return _image_info(PNG, width, height)


def _read_png_size(data: bytes) -> tuple[int, int]:
    """Width and height that the header tells."""
    at = len(_PNG_SIGNATURE)
    if len(data) < at + _PNG_HEADER.size:
        _raise_truncated(PNG)
    length, kind, width, height, depth, colour, *methods, checksum = _PNG_HEADER.unpack_from(data, at)
    if (length, kind) != (13, b"IHDR"):
        _raise_broken(PNG, "it does not begin with its header")
    if zlib.crc32(data[at + 4 : at + 4 + 4 + 13]) != checksum:
        _raise_broken(PNG, "the checksum of its header is wrong")
    if depth not in _PNG_DEPTHS.get(colour, ()) or methods not in ([0, 0, 0], [0, 0, 1]):
        _raise_broken(PNG, "its header describes no such image")
    if max(width, height) > _PNG_MAX_SIDE:
        _raise_broken(PNG, f"it says its size is {width} x {height} pixels")
    return width, height


def _iterate_png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each chunk that matters here, and where its content begins and how long it is."""
    at = len(_PNG_SIGNATURE) + _PNG_HEADER.size
    last, chunks, looked_at = len(data) - _PNG_FRAME, 0, {b"IDAT", b"IHDR", b"fcTL"}
    while at <= last:
        length, kind = _PNG_CHUNK.unpack_from(data, at)
        if kind == b"IEND":
            if at + length > last:
                break
            return
        if kind in looked_at:
            yield kind, at + _PNG_CHUNK.size, length
            if kind == b"IDAT" and length:
                looked_at.discard(kind)
        elif not kind.isalpha():
            _raise_broken(PNG, "it holds a chunk of no type")
        at += _PNG_FRAME + length
        chunks += 1
        if not chunks % _CHUNKS_PER_YIELD:
            time.sleep(0)
    _raise_truncated(PNG)


def _check_png_pixels(start: bytes) -> None:
    """Refuse pixels that do not begin as they must: compressed, with the filter of the first row."""
    try:
        first = zlib.decompressobj().decompress(start, 1)
    except zlib.error:
        _raise_broken(PNG, "its pixels can't be decompressed")
    if first and first[0] >= _PNG_FILTERS:
        _raise_broken(PNG, "its pixels are filtered in no known way")


# JPEG: markers FF xx, each with a segment that begins with its own length, save the end and a few that do not matter
# here. Scans are entropy-coded data in which FF is always followed by 00 or a restart, so any other marker ends them. A
# thumbnail with an end of its own may lie within a segment, hence segments are skipped by their length.

_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xc7\xc9-\xcf\xd9-\xef\xfe]")


_JPEG_LENGTH = Layout(">H")


_JPEG_FRAME = Layout(">BHHB")


_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


_JPEG_PROGRESSIVE = frozenset({0xC2, 0xCA})


_JPEG_ARITHMETIC = frozenset({0xC9, 0xCA})


_JPEG_LOSSLESS = 0xC3


_JPEG_SUPPORTED = _JPEG_PROGRESSIVE | {0xC0, 0xC1, 0xC9, _JPEG_LOSSLESS}
"""The ways to code pixels that decoders know: not the hierarchical ones."""


_JPEG_END = 0xD9


_JPEG_PARSED = _JPEG_FRAMES | {0xDA, 0xDB, 0xDC}


_JPEG_COMPONENTS = frozenset({1, 3, 4})


_JPEG_SAMPLES = range(1, 5)


_JPEG_MAX_SIDE = 65_500


_JPEG_MAX_BLOCKS = 10


_JPEG_SEARCH_BYTES = 1024 * 1024
"""How many bytes are searched at a time: other threads get no turn within one search."""


class _JpegFrame(Struct, frozen=True):
    """The header of a frame; of each component by its id, how many blocks it has in an unit, and its table."""

    marker: int
    width: int
    height: int
    components: Mapping[int, tuple[int, int]]


def _inspect_jpeg(data: bytes) -> ImageInfo:
    frame: _JpegFrame | None = None
    tables: set[int] = set()
    scanned = False
    at = 2
    for _ in range(MAX_SEGMENTS):
        at = _find_jpeg_marker_end(data, at)
        marker = data[at - 1]
        if marker == _JPEG_END:
            if frame is None or not scanned:
                _raise_broken(JPEG, "it ends before its pixels")
            return _image_info(JPEG, frame.width, frame.height)
        if at + 2 > len(data):
            _raise_truncated(JPEG)
        (length,) = _JPEG_LENGTH.unpack_from(data, at)
        if at + length > len(data):
            _raise_truncated(JPEG)
        content = data[at + 2 : at + length] if marker in _JPEG_PARSED else b""
        at += length
        match marker:
            case 0xDA:  # a scan
                _check_jpeg_scan(content, frame, tables)
                scanned = True
            case 0xDB:  # tables of quantization
                tables.update(_read_jpeg_tables(content))
            case 0xDC if frame and content != frame.height.to_bytes(2, "big"):  # the number of lines
                _raise_broken(JPEG, "it says twice how high it is, and not the same")
            case _ if marker in _JPEG_FRAMES:
                frame = _read_jpeg_frame(marker, content, frame)
    _raise_too_many_segments(JPEG)


def _read_jpeg_frame(marker: int, content: bytes, previous: _JpegFrame | None) -> _JpegFrame:
    if previous:
        _raise_broken(JPEG, "it has two frames")
    if len(content) < _JPEG_FRAME.size:
        _raise_broken(JPEG, "the header of its frame is too short")
    bits, height, width, count = _JPEG_FRAME.unpack_from(content)
    if marker not in _JPEG_SUPPORTED or bits != 8 or count not in _JPEG_COMPONENTS:
        _raise_broken(JPEG, "it is coded in a way that no decoder knows")
    described = content[_JPEG_FRAME.size :]
    components = {
        name: ((each >> 4) * (each & 15), table)
        for name, each, table in zip(described[::3], described[1::3], described[2::3], strict=False)
        if each >> 4 in _JPEG_SAMPLES and each & 15 in _JPEG_SAMPLES
    }
    if len(described) != 3 * count or len(components) < len(set(described[::3])):
        _raise_broken(JPEG, "the header of its frame contradicts itself")
    if max(width, height) > _JPEG_MAX_SIDE:
        _raise_broken(JPEG, f"it says its size is {width} x {height} pixels")
    return _JpegFrame(marker, width, height, components)


def _read_jpeg_tables(content: bytes) -> Iterator[int]:
    """The numbers of the tables that a segment defines."""
    at = 0
    while at < len(content):
        yield content[at] & 15
        at += 129 if content[at] >> 4 else 65


def _check_jpeg_scan(content: bytes, frame: _JpegFrame | None, tables: Collection[int]) -> None:
    """Refuse a scan that does not go with its frame, as every decoder does."""
    if frame is None:
        _raise_broken(JPEG, "its pixels come before the header of their frame")
    count = content[0] if content else 0
    names, (first, last, bits) = content[1 : 1 + 2 * count : 2], (*content[-3:], 0, 0, 0)[:3]
    fits = 0 < count <= 4 and len(content) == 4 + 2 * count and all(each in frame.components for each in names)
    if not fits or (count > 1 and sum(frame.components[each][0] for each in names) > _JPEG_MAX_BLOCKS):
        _raise_broken(JPEG, "the header of its pixels contradicts that of its frame")
    if frame.marker == _JPEG_LOSSLESS:
        known = 0 < first < 8 and last == 0
    else:
        known = all(frame.components[each][1] in tables for each in names)
        known = known and (
            frame.marker in _JPEG_ARITHMETIC or not any(each & 0xCC for each in content[2 : 2 + 2 * count : 2])
        )
        if frame.marker in _JPEG_PROGRESSIVE:
            known = known and (last == 0 if first == 0 else first <= last < 64 and count == 1) and bits & 15 < 14
    if not known:
        _raise_broken(JPEG, "it is coded in a way that no decoder knows")


def _find_jpeg_marker_end(data: bytes, at: int) -> int:
    """Where the next marker from `at` on ends."""
    for start in range(at, len(data), _JPEG_SEARCH_BYTES):
        if found := _JPEG_MARKER.search(data, start, start + _JPEG_SEARCH_BYTES + 1):
            return found.end()
    _raise_truncated(JPEG)


# WebP: a RIFF file that begins with its pixels, or else with the size of its canvas, which a still image fills, and in
# which the frames of an animation lie.

_RIFF_CHUNK = Layout("<4sI")


_WEBP_CANVAS = 10


_WEBP_ANIMATED = 0x02


_WEBP_RESERVED = 0xC1


_WEBP_FRAME = 16


_WEBP_MAX_PIXELS = 2**32


_WEBP_PIXELS = frozenset({b"VP8 ", b"VP8L"})


def _inspect_webp(data: bytes) -> ImageInfo:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        _raise_truncated(WEBP)
    canvas: tuple[int, int] | None = None
    animated = pixels = False
    for kind, at, length in _iterate_riff_chunks(data, 12, end):
        if kind in _WEBP_PIXELS:
            size = _read_webp_size(kind, data[at : at + min(length, 10)], length)
            if canvas is None:
                return _image_info(WEBP, *size)
            if animated:
                continue
            if size != canvas:
                _raise_broken(
                    WEBP, f"its canvas has {canvas[0]} x {canvas[1]} pixels, and its picture {size[0]} x {size[1]}"
                )
            pixels = True
        elif canvas is None:
            canvas, animated = _read_webp_canvas(kind, data[at : at + length])
        elif kind == b"ANMF" and animated:
            _check_webp_frame(data, at, length, canvas)
            pixels = True
    if canvas is None or not pixels:
        _raise_broken(WEBP, "it holds no pixels")
    return _image_info(WEBP, *canvas)


def _iterate_riff_chunks(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each chunk, and where its content begins and how long it is."""
    for _ in range(MAX_SEGMENTS):
        if at + _RIFF_CHUNK.size > end:
            return
        kind, length = _RIFF_CHUNK.unpack_from(data, at)
        at += _RIFF_CHUNK.size
        if at + length > end:
            _raise_truncated(WEBP)
        yield kind, at, length
        at += length + length % 2
    if at + _RIFF_CHUNK.size <= end:
        _raise_too_many_segments(WEBP)


def _read_webp_canvas(kind: bytes, content: bytes) -> tuple[tuple[int, int], bool]:
    """The size of the canvas, and whether it is one of an animation."""
    if kind != b"VP8X" or len(content) != _WEBP_CANVAS:
        _raise_broken(WEBP, "it does not begin with its header")
    width, height = 1 + int.from_bytes(content[4:7], "little"), 1 + int.from_bytes(content[7:10], "little")
    if width * height >= _WEBP_MAX_PIXELS:
        _raise_broken(WEBP, f"it says its size is {width} x {height} pixels")
    animated = bool(content[0] & _WEBP_ANIMATED)
    if animated and content[0] & _WEBP_RESERVED:
        _raise_broken(WEBP, "its header describes no such image")
    return (width, height), animated


def _check_webp_frame(data: bytes, at: int, length: int, canvas: tuple[int, int]) -> None:
    """Refuse a frame of an animation that does not lie within its canvas, or whose pixels are of another size."""
    if length < _WEBP_FRAME:
        _raise_broken(WEBP, "the header of a frame is too short")
    left, top, width, height = (int.from_bytes(data[at + each : at + each + 3], "little") for each in (0, 3, 6, 9))
    if 2 * left + width + 1 > canvas[0] or 2 * top + height + 1 > canvas[1]:
        _raise_broken(WEBP, f"it has a frame that does not lie within its {canvas[0]} x {canvas[1]} pixels")
    for kind, start, size in _iterate_riff_chunks(data, at + _WEBP_FRAME, at + length):
        if kind in _WEBP_PIXELS:
            if _read_webp_size(kind, data[start : start + min(size, 10)], size) != (width + 1, height + 1):
                _raise_broken(WEBP, "it has a frame of another size than its pixels")
            return
    _raise_broken(WEBP, "it has a frame without pixels")


def _read_webp_size(kind: bytes, head: bytes, length: int) -> tuple[int, int]:
    """The size that the first ten bytes of compressed pixels tell."""
    if kind == b"VP8L" and len(head) >= 5 and head[0] == 0x2F:
        bits = int.from_bytes(head[1:5], "little")
        if bits >> 29 == 0:
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(head) == 10 and head[3:6] == b"\x9d\x01\x2a":
        bits = int.from_bytes(head[:3], "little")
        # A key frame, of a known profile, that is shown, and whose first part lies within the chunk.
        if bits & 1 == 0 and bits >> 1 & 7 < 4 and bits >> 4 & 1 and bits >> 5 < length:
            return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    _raise_broken(WEBP, "its pixels do not begin with their header")


# What people send instead.


def _has_prefix(*prefixes: bytes) -> Callable[[bytes], bool]:
    return lambda data: data.startswith(prefixes)


def _has_brand(*brands: bytes) -> Callable[[bytes], bool]:
    """Whether it is a file of the ISO base media family with one of these brands."""
    return lambda data: data[4:8] == b"ftyp" and data[8:12] in brands


def _is_markup(data: bytes) -> bool:
    return (
        data[:256]
        .removeprefix(b"\xef\xbb\xbf")
        .lstrip()
        .lower()
        .startswith((b"<svg", b"<?xml", b"<!doctype", b"<html"))
    )


_OTHER_FORMATS: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    ("a GIF image", _has_prefix(b"GIF87a", b"GIF89a")),
    ("a BMP image", _has_prefix(b"BM")),
    ("a TIFF image", _has_prefix(b"II*\0", b"MM\0*")),
    ("a HEIC image", _has_brand(b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")),
    ("an AVIF image", _has_brand(b"avif", b"avis")),
    ("a JPEG XL image", _has_prefix(b"\xff\x0a", b"\0\0\0\x0cJXL ")),
    ("a JPEG 2000 image", _has_prefix(b"\0\0\0\x0cjP  ")),
    ("a Photoshop document", _has_prefix(b"8BPS")),
    ("an icon", _has_prefix(b"\0\0\1\0")),
    ("a PDF document", _has_prefix(b"%PDF")),
    ("a ZIP archive", _has_prefix(b"PK\3\4")),
    ("SVG, XML or HTML", _is_markup),
)

SVG = "image/svg+xml"


OCTET_STREAM = "application/octet-stream"


SNIFF_BYTES = 65_536
"""So many bytes are enough to tell what a result is; of an SVG, comments and declarations may fill most of them."""


BITMAP_SNIFF_BYTES = 12
"""So many bytes are enough to tell a bitmap."""


EXTENSIONS: Mapping[str, str] = {PNG: "png", JPEG: "jpg", WEBP: "webp", SVG: "svg", OCTET_STREAM: "bin"}
"""How a file of each media type is called."""


_BITMAPS = frozenset({PNG, JPEG, WEBP})


_ALLOWED_TYPES: Mapping[ArtifactName, frozenset[str]] = {
    ArtifactName.IMAGE: _BITMAPS,
    ArtifactName.GRID: _BITMAPS,
    ArtifactName.VECTOR: frozenset({SVG}),
}


# Blanks, declarations and comments in any number, then the root. Nothing is tried twice: that would take for ever.
_SVG_START = re.compile(
    rb"(?:\xef\xbb\xbf)?"
    rb"(?>\s+|<\?.*?\?>|<!--.*?-->|<!DOCTYPE\s+(?:\w+:)?svg\b[^<>\[]*(?:\[.*?\]\s*)?>)*+"
    rb"<(?:\w+:)?svg[\s>/]",
    re.DOTALL,
)


def sniff_type(head: bytes) -> str:
    """The media type of a result that begins so; OPAQUE for any that no result may have."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if head.startswith(b"\xff\xd8\xff"):
        return JPEG
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return WEBP
    return SVG if _SVG_START.match(head) else OCTET_STREAM


def is_allowed_type(name: ArtifactName, media_type: str) -> bool:
    """Whether a result of this name may be of this type."""
    return media_type in _ALLOWED_TYPES[name]
