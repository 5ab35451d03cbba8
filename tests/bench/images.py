"""Incompressible PNGs of random pixels, the same each time."""

from __future__ import annotations

import random
import struct
import zlib
from functools import cache

SMALL = 300_000
LARGE = 10_000_000
_BYTES_PER_PIXEL = 3
_FRAME = 57
"""Bytes of a PNG beside its data: the signature, and three chunks with lengths and checksums."""


@cache
def random_png(size: int) -> bytes:
    """Return a PNG of about this size."""
    side = int(((size - _FRAME) / _BYTES_PER_PIXEL) ** 0.5)
    source = random.Random(size)
    rows = b"".join(b"\0" + source.randbytes(side * _BYTES_PER_PIXEL) for _ in range(side))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
