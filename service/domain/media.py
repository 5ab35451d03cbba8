"""Inspection of images by their bytes, and the media types of artifacts.

A submission is paid for even if the upload is cut off or no decoder reads it, so images are checked to their end, but
only their structure, never their pixels. What some decoder reads is not refused. Sizes are those that decoders
allocate. Every pass goes forward only: time is linear in the bytes.
"""

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
"""Segments of a JPEG or chunks of a WebP: ordinary encoders write far fewer, whatever the size."""


class ImageInfo(Struct, frozen=True):
    media_type: str
    width: int
    height: int


Pause = Callable[[], None]
"""Called after each 1 to 4 ms of a long inspection; what it raises ends the inspection."""


def yield_to_threads() -> None:
    time.sleep(0)


def inspect_image(data: bytes, pause: Pause = yield_to_threads) -> ImageInfo:
    """Return media type and size of a PNG, JPEG or WebP image.

    Only heads are read, in under 0.1 ms; a JPEG is searched for its end, and any image may have very many parts.
    Raises UnsupportedMediaType for other formats, InvalidImage for a broken or incomplete image.
    """
    if not data:
        raise InvalidImage("The image is empty: send the bytes of a PNG, JPEG or WebP image.")
    inspectors = {PNG: _inspect_png, JPEG: _inspect_jpeg, WEBP: _inspect_webp}
    return inspectors[check_bitmap_type(data)](data, _Work(pause))


def check_bitmap_type(head: bytes) -> str:
    """Return the type of an image that begins with these bytes. Raises UnsupportedMediaType for other formats."""
    media_type = sniff_type(head[:BITMAP_SNIFF_BYTES])
    if media_type in {PNG, JPEG, WEBP}:
        return media_type
    for pattern, name in _OTHER_FORMATS:
        if pattern.match(head[:256]):
            raise UnsupportedMediaType(f"The file is {name}; send a PNG, JPEG or WebP image.")
    raise UnsupportedMediaType("The file's type is not known; send a PNG, JPEG or WebP image.")


class _Work:
    """Work of an inspection, in steps: a step is a chunk or segment, or 1 KiB to search. Each takes 1 to 7 us."""

    def __init__(self, pause: Pause) -> None:
        self._pause = pause
        self._steps = 0

    def add(self, steps: int) -> None:
        self._steps += steps
        if self._steps >= _STEPS_PER_PAUSE:
            self._steps = 0
            self._pause()


_STEPS_PER_PAUSE = 512


def _image_info(media_type: str, width: int, height: int) -> ImageInfo:
    if width < 1 or height < 1:
        _raise_broken(media_type, f"its size would be {width} x {height} pixels")
    return ImageInfo(media_type, width, height)


def _raise_broken(media_type: str, reason: str) -> NoReturn:
    raise InvalidImage(
        f"The {_FORMAT_NAMES[media_type]} image is broken: {reason}. Send the whole file, as it is on disk."
    )


def _raise_truncated(media_type: str) -> NoReturn:
    raise InvalidImage(f"The {_FORMAT_NAMES[media_type]} image is cut off: its end is missing. Send the whole file.")


_TOO_MANY_SEGMENTS = f"it consists of more than {MAX_SEGMENTS} pieces"
_FORMAT_NAMES = {PNG: "PNG", JPEG: "JPEG", WEBP: "WebP"}
_OTHER_FORMATS = (
    (re.compile(rb"GIF8[79]a"), "a GIF image"),
    (re.compile(rb"....ftyp(?:hei[cxms]|hevc|mif1|msf1)", re.DOTALL), "a HEIC image"),
    (re.compile(rb"%PDF"), "a PDF document"),
    (re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<svg|<\?xml|<!doctype|<html)", re.IGNORECASE), "SVG, XML or HTML"),
)
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


def _inspect_png(data: bytes, work: _Work) -> ImageInfo:
    width, height = _read_png_size(data)
    pixels = False
    for kind, at, length in _iterate_png_chunks(data, work):
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
        _raise_broken(PNG, f"its size would be {width} x {height} pixels")
    return width, height


def _iterate_png_chunks(data: bytes, work: _Work) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, offset and length of the content of each relevant chunk."""
    at = len(_PNG_SIGNATURE) + _PNG_HEADER.size
    last, relevant = len(data) - _PNG_FRAME, {b"IDAT", b"IHDR", b"fcTL"}
    while at <= last:
        length, kind = _PNG_CHUNK.unpack_from(data, at)
        if kind == b"IEND":
            if at + length > last:
                break
            return
        if kind in relevant:
            yield kind, at + _PNG_CHUNK.size, length
            if kind == b"IDAT" and length:
                relevant.discard(kind)
        elif not kind.isalpha():
            _raise_broken(PNG, "it holds a chunk of no type")
        at += _PNG_FRAME + length
        work.add(1)
    _raise_truncated(PNG)


def _check_png_pixels(start: bytes) -> None:
    """Raise InvalidImage unless the pixels begin as compressed data with the filter of the first row."""
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
"""Codings that decoders support: not the hierarchical ones."""
_JPEG_END = 0xD9
_JPEG_PARSED = _JPEG_FRAMES | {0xDA, 0xDB, 0xDC}
_JPEG_COMPONENTS = frozenset({1, 3, 4})
_JPEG_SAMPLES = range(1, 5)
_JPEG_MAX_SIDE = 65_500
_JPEG_MAX_BLOCKS = 10
_JPEG_SEARCH_BYTES = 256 * 1024
"""Bytes of one search, which no other thread interrupts."""


class _JpegFrame(Struct, frozen=True):
    """A frame header; per component id: blocks in a unit, and its table."""

    marker: int
    width: int
    height: int
    components: Mapping[int, tuple[int, int]]


def _inspect_jpeg(data: bytes, work: _Work) -> ImageInfo:
    frame: _JpegFrame | None = None
    tables: set[int] = set()
    scanned = False
    at = 2
    for _ in range(MAX_SEGMENTS):
        at = _find_jpeg_marker_end(data, at, work)
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
        work.add(1 + length // 1_024)
        match marker:
            case 0xDA:  # a scan
                _check_jpeg_scan(content, frame, tables)
                scanned = True
            case 0xDB:  # tables of quantization
                tables.update(_read_jpeg_tables(content))
            case 0xDC if frame and content != frame.height.to_bytes(2, "big"):  # the number of lines
                _raise_broken(JPEG, "two of its headers differ in the height")
            case _ if marker in _JPEG_FRAMES:
                frame = _read_jpeg_frame(marker, content, frame)
    _raise_broken(JPEG, _TOO_MANY_SEGMENTS)


def _read_jpeg_frame(marker: int, content: bytes, previous: _JpegFrame | None) -> _JpegFrame:
    if previous:
        _raise_broken(JPEG, "it has two frames")
    if len(content) < _JPEG_FRAME.size:
        _raise_broken(JPEG, "the header of its frame is too short")
    bits, height, width, count = _JPEG_FRAME.unpack_from(content)
    if marker not in _JPEG_SUPPORTED or bits != 8 or count not in _JPEG_COMPONENTS:
        _raise_broken(JPEG, "it is coded in a way that no decoder knows")
    description = content[_JPEG_FRAME.size :]
    components = {
        name: ((sampling >> 4) * (sampling & 15), table)
        for name, sampling, table in zip(description[::3], description[1::3], description[2::3], strict=False)
        if sampling >> 4 in _JPEG_SAMPLES and sampling & 15 in _JPEG_SAMPLES
    }
    if len(description) != 3 * count or len(components) < len(set(description[::3])):
        _raise_broken(JPEG, "the header of its frame contradicts itself")
    if max(width, height) > _JPEG_MAX_SIDE:
        _raise_broken(JPEG, f"its size would be {width} x {height} pixels")
    return _JpegFrame(marker, width, height, components)


def _read_jpeg_tables(content: bytes) -> Iterator[int]:
    at = 0
    while at < len(content):
        yield content[at] & 15
        at += 129 if content[at] >> 4 else 65


def _check_jpeg_scan(content: bytes, frame: _JpegFrame | None, tables: Collection[int]) -> None:
    """Raise InvalidImage if a scan contradicts its frame, as every decoder does."""
    if frame is None:
        _raise_broken(JPEG, "its pixels come before the header of their frame")
    count = content[0] if content else 0
    names, (first, last, bits) = content[1 : 1 + 2 * count : 2], (*content[-3:], 0, 0, 0)[:3]
    is_consistent = 0 < count <= 4 and len(content) == 4 + 2 * count and all(name in frame.components for name in names)
    if not is_consistent or (count > 1 and sum(frame.components[name][0] for name in names) > _JPEG_MAX_BLOCKS):
        _raise_broken(JPEG, "the header of its pixels contradicts that of its frame")
    if frame.marker == _JPEG_LOSSLESS:
        is_known = 0 < first < 8 and last == 0
    else:
        is_known = all(frame.components[name][1] in tables for name in names)
        is_known = is_known and (
            frame.marker in _JPEG_ARITHMETIC
            or not any(selectors & 0xCC for selectors in content[2 : 2 + 2 * count : 2])
        )
        if frame.marker in _JPEG_PROGRESSIVE:
            is_known = is_known and (last == 0 if first == 0 else first <= last < 64 and count == 1) and bits & 15 < 14
    if not is_known:
        _raise_broken(JPEG, "it is coded in a way that no decoder knows")


def _find_jpeg_marker_end(data: bytes, at: int, work: _Work) -> int:
    for start in range(at, len(data), _JPEG_SEARCH_BYTES):
        match = _JPEG_MARKER.search(data, start, start + _JPEG_SEARCH_BYTES + 1)
        work.add((match.end() - start if match else _JPEG_SEARCH_BYTES) // 1_024)
        if match:
            return match.end()
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


def _inspect_webp(data: bytes, work: _Work) -> ImageInfo:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        _raise_truncated(WEBP)
    canvas: tuple[int, int] | None = None
    animated = pixels = False
    for kind, at, length in _iterate_riff_chunks(data, 12, end, work):
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
            _check_webp_frame(data, at, length, canvas, work)
            pixels = True
    if canvas is None or not pixels:
        _raise_broken(WEBP, "it holds no pixels")
    return _image_info(WEBP, *canvas)


def _iterate_riff_chunks(data: bytes, at: int, end: int, work: _Work) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, offset and length of the content of each chunk."""
    for _ in range(MAX_SEGMENTS):
        work.add(1)
        if at + _RIFF_CHUNK.size > end:
            return
        kind, length = _RIFF_CHUNK.unpack_from(data, at)
        at += _RIFF_CHUNK.size
        if at + length > end:
            _raise_truncated(WEBP)
        yield kind, at, length
        at += length + length % 2
    if at + _RIFF_CHUNK.size <= end:
        _raise_broken(WEBP, _TOO_MANY_SEGMENTS)


def _read_webp_canvas(kind: bytes, content: bytes) -> tuple[tuple[int, int], bool]:
    """Return the size of the canvas, and whether it is animated."""
    if kind != b"VP8X" or len(content) != _WEBP_CANVAS:
        _raise_broken(WEBP, "it does not begin with its header")
    width, height = 1 + int.from_bytes(content[4:7], "little"), 1 + int.from_bytes(content[7:10], "little")
    if width * height >= _WEBP_MAX_PIXELS:
        _raise_broken(WEBP, f"its size would be {width} x {height} pixels")
    animated = bool(content[0] & _WEBP_ANIMATED)
    if animated and content[0] & _WEBP_RESERVED:
        _raise_broken(WEBP, "its header describes no such image")
    return (width, height), animated


def _check_webp_frame(data: bytes, at: int, length: int, canvas: tuple[int, int], work: _Work) -> None:
    """Raise InvalidImage if a frame lies outside its canvas or its pixels have another size."""
    if length < _WEBP_FRAME:
        _raise_broken(WEBP, "the header of a frame is too short")
    left, top, width, height = (
        int.from_bytes(data[at + offset : at + offset + 3], "little") for offset in (0, 3, 6, 9)
    )
    if 2 * left + width + 1 > canvas[0] or 2 * top + height + 1 > canvas[1]:
        _raise_broken(WEBP, f"it has a frame that does not lie within its {canvas[0]} x {canvas[1]} pixels")
    for kind, start, size in _iterate_riff_chunks(data, at + _WEBP_FRAME, at + length, work):
        if kind in _WEBP_PIXELS:
            if _read_webp_size(kind, data[start : start + min(size, 10)], size) != (width + 1, height + 1):
                _raise_broken(WEBP, "it has a frame of another size than its pixels")
            return
    _raise_broken(WEBP, "it has a frame without pixels")


def _read_webp_size(kind: bytes, head: bytes, length: int) -> tuple[int, int]:
    """Return the size in the first ten bytes of compressed pixels."""
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


SVG = "image/svg+xml"
OCTET_STREAM = "application/octet-stream"
SNIFF_BYTES = 65_536
"""Bytes that suffice to recognise a result; comments and declarations may fill most of them in an SVG."""
BITMAP_SNIFF_BYTES = 12
"""Bytes that suffice to recognise a bitmap."""
EXTENSIONS: Mapping[str, str] = {PNG: "png", JPEG: "jpg", WEBP: "webp", SVG: "svg", OCTET_STREAM: "bin"}

# Blanks, declarations and comments in any number, then the root. No backtracking, which could take exponential time.
_SVG_START = re.compile(
    rb"(?:\xef\xbb\xbf)?"
    rb"(?>\s+|<\?.*?\?>|<!--.*?-->|<!DOCTYPE\s+(?:\w+:)?svg\b[^<>\[]*(?:\[.*?\]\s*)?>)*+"
    rb"<(?:\w+:)?svg[\s>/]",
    re.DOTALL,
)


def sniff_type(head: bytes) -> str:
    """Return the media type of a result by its first bytes, never by its label."""
    if head.startswith(_PNG_SIGNATURE):
        return PNG
    if head.startswith(b"\xff\xd8\xff"):
        return JPEG
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return WEBP
    return SVG if _SVG_START.match(head) else OCTET_STREAM


def is_allowed_type(name: ArtifactName, media_type: str) -> bool:
    return media_type in ({SVG} if name is ArtifactName.VECTOR else {PNG, JPEG, WEBP})
