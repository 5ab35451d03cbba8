"""What an image is, told from its bytes alone, and whether it is all there.

A submission is paid for even if the upload was cut off, so an image is walked to its end: but only its frame, never
its pixels. What ordinary software reads is not refused; whether the pixels make sense is for the upstream to judge.
Each walk goes forward only, so it takes time in proportion to the bytes, and only so many steps: a file made of the
smallest pieces there are would keep the interpreter busy for seconds.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from struct import Struct as Layout
from typing import NoReturn

from msgspec import Struct

from service.domain.errors import InvalidImage, UnsupportedMediaType

PNG = "image/png"
JPEG = "image/jpeg"
WEBP = "image/webp"


MAX_PIECES = 10_000
"""How many segments or chunks an image may consist of: the largest files of ordinary software have about half of it."""


class ImageInfo(Struct, frozen=True):
    """What an image is, and its size in pixels."""

    media_type: str
    width: int
    height: int


def inspect(data: bytes) -> ImageInfo:
    """Tell a PNG, JPEG or WebP image and its size.

    Raises UnsupportedMediaType for bytes that are neither, InvalidImage for one that is broken or cut off.
    """
    if not data:
        raise InvalidImage("The image is empty: send the bytes of a PNG, JPEG or WebP image.")
    if data.startswith(_PNG_SIGNATURE):
        return _png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    known = next((f"The file is {name}" for name, told in _OTHERS if told(data)), "The file's type is not known")
    raise UnsupportedMediaType(f"{known}; send a PNG, JPEG or WebP image.")


def _info(media_type: str, width: int, height: int) -> ImageInfo:
    if width < 1 or height < 1:
        _broken(media_type, f"it says its size is {width} x {height} pixels")
    return ImageInfo(media_type, width, height)


def _broken(media_type: str, why: str) -> NoReturn:
    raise InvalidImage(f"The {_NAMES[media_type]} image is broken: {why}. Send the whole file, as it is on disk.")


def _cut_off(media_type: str) -> NoReturn:
    raise InvalidImage(f"The {_NAMES[media_type]} image is cut off: its end is missing. Send the whole file.")


def _too_many_pieces(media_type: str) -> NoReturn:
    _broken(media_type, f"it consists of more than {MAX_PIECES} pieces")


_NAMES = {PNG: "PNG", JPEG: "JPEG", WEBP: "WebP"}

# PNG: a signature, then chunks of length, type, content and checksum, from IHDR to IEND.

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK = Layout(">I4s")
_PNG_HEADER = Layout(">I4sIIBBBBBI")
_PNG_FRAME = 12
"""Bytes of a chunk beside its content."""


def _png(data: bytes) -> ImageInfo:
    at = len(_PNG_SIGNATURE)
    if len(data) < at + _PNG_HEADER.size:
        _cut_off(PNG)
    length, kind, width, height, *_, checksum = _PNG_HEADER.unpack_from(data, at)
    if (length, kind) != (13, b"IHDR"):
        _broken(PNG, "it does not begin with its header")
    if zlib.crc32(data[at + 4 : at + 4 + 4 + 13]) != checksum:
        _broken(PNG, "the checksum of its header is wrong")
    pixels = False
    for _ in range(MAX_PIECES):
        at += _PNG_FRAME + length
        if at + _PNG_FRAME > len(data):
            _cut_off(PNG)
        length, kind = _PNG_CHUNK.unpack_from(data, at)
        if kind == b"IEND":
            break
        pixels = pixels or kind == b"IDAT"
    else:
        _too_many_pieces(PNG)
    if at + _PNG_FRAME + length > len(data):
        _cut_off(PNG)
    if not pixels:
        _broken(PNG, "it holds no pixels")
    return _info(PNG, width, height)


# JPEG: markers FF xx, each with a segment that begins with its own length, save the end and a few that do not matter
# here. Scans are entropy-coded data in which FF is always followed by 00 or a restart, so any other marker ends them. A
# thumbnail with an end of its own may lie within a segment, hence segments are skipped by their length.

_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xc7\xc9-\xcf\xd9-\xef\xfe]")
_JPEG_LENGTH = Layout(">H")
_JPEG_SIZE = Layout(">HH")
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xCC}
_JPEG_SCAN = 0xDA
_JPEG_END = 0xD9
_JPEG_STRETCH = 1024 * 1024
"""How many bytes are searched at a time: other threads get no turn within one search."""


def _jpeg(data: bytes) -> ImageInfo:
    size: tuple[int, int] | None = None
    scanned = False
    at = 2
    for _ in range(MAX_PIECES):
        at = _jpeg_marker_end(data, at)
        marker = data[at - 1]
        if marker == _JPEG_END:
            if size is None or not scanned:
                _broken(JPEG, "it ends before its pixels")
            return _info(JPEG, *size)
        if at + 2 > len(data):
            _cut_off(JPEG)
        (length,) = _JPEG_LENGTH.unpack_from(data, at)
        if at + length > len(data):
            _cut_off(JPEG)
        if marker in _JPEG_FRAMES and size is None:
            if length < 8:
                _broken(JPEG, "the header of its frame is too short")
            height, width = _JPEG_SIZE.unpack_from(data, at + 3)
            size = width, height
        scanned = scanned or marker == _JPEG_SCAN
        at += length
    _too_many_pieces(JPEG)


def _jpeg_marker_end(data: bytes, at: int) -> int:
    """Where the next marker from `at` on ends."""
    for start in range(at, len(data), _JPEG_STRETCH):
        if found := _JPEG_MARKER.search(data, start, start + _JPEG_STRETCH + 1):
            return found.end()
    _cut_off(JPEG)


# WebP: a RIFF file whose first chunk tells the size, in one of three ways.

_RIFF_CHUNK = Layout("<4sI")
_RIFF_PIXELS = frozenset({b"VP8 ", b"VP8L", b"ANMF"})


def _webp(data: bytes) -> ImageInfo:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        _cut_off(WEBP)
    at, size = 12, None
    for _ in range(MAX_PIECES):
        if at + _RIFF_CHUNK.size > end:
            _broken(WEBP, "it holds no pixels")
        kind, length = _RIFF_CHUNK.unpack_from(data, at)
        at += _RIFF_CHUNK.size
        if at + length > end:
            _cut_off(WEBP)
        if size is None:
            size = _webp_size(kind, data[at : at + min(length, 10)])
        if kind in _RIFF_PIXELS:
            return _info(WEBP, *size)
        at += length + length % 2
    _too_many_pieces(WEBP)


def _webp_size(kind: bytes, head: bytes) -> tuple[int, int]:
    """The size that the first chunk tells in its first ten bytes."""
    if kind == b"VP8X" and len(head) == 10:
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L" and len(head) >= 5 and head[0] == 0x2F:
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(head) == 10 and head[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    _broken(WEBP, "it does not begin with its header")


# What people send instead.


def _begins(*starts: bytes) -> Callable[[bytes], bool]:
    return lambda data: data.startswith(starts)


def _branded(*brands: bytes) -> Callable[[bytes], bool]:
    """Whether it is a file of the ISO base media family with one of these brands."""
    return lambda data: data[4:8] == b"ftyp" and data[8:12] in brands


def _markup(data: bytes) -> bool:
    return (
        data[:256]
        .removeprefix(b"\xef\xbb\xbf")
        .lstrip()
        .lower()
        .startswith((b"<svg", b"<?xml", b"<!doctype", b"<html"))
    )


_OTHERS: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    ("a GIF image", _begins(b"GIF87a", b"GIF89a")),
    ("a BMP image", _begins(b"BM")),
    ("a TIFF image", _begins(b"II*\0", b"MM\0*")),
    ("a HEIC image", _branded(b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")),
    ("an AVIF image", _branded(b"avif", b"avis")),
    ("a JPEG XL image", _begins(b"\xff\x0a", b"\0\0\0\x0cJXL ")),
    ("a JPEG 2000 image", _begins(b"\0\0\0\x0cjP  ")),
    ("a Photoshop document", _begins(b"8BPS")),
    ("an icon", _begins(b"\0\0\1\0")),
    ("a PDF document", _begins(b"%PDF")),
    ("a ZIP archive", _begins(b"PK\3\4")),
    ("SVG, XML or HTML", _markup),
)
