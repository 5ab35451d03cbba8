"""Decodes the vendor's responses: the JSON object of a body, whatever its coding, character set and small faults."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import msgspec

LARGEST_BODY = 65_536
"""A body is decoded up to this many bytes, before and after it was inflated."""
_LONGEST_NUMBER = 300
"""Digits of an integer; Python refuses to convert a few thousand."""
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_ZLIB, _RAW = zlib.MAX_WBITS, -zlib.MAX_WBITS
_ANY_HEADER = zlib.MAX_WBITS | 32
_NOISE = "\ufeff\ufffd\x00 \t\r\n"


def decode_object(body: bytes) -> Mapping[str, Any]:
    """Return the JSON object of a body; empty where there is none.

    Only a body that is not strictly JSON takes the slow way: it is inflated if it is compressed (which a response is
    although it was not requested, with or without a header that says so), decoded by its byte order mark, as UTF-8, as
    GB18030 and with replacement characters, and parsed by the standard library, as the vendor's sample client does.
    """
    try:
        found = msgspec.json.decode(body.removeprefix(_BOM))
    except (msgspec.DecodeError, ValueError, RecursionError):
        found = _decode_leniently(body)
    return found if isinstance(found, dict) else {}


def _decode_leniently(body: bytes) -> Any:
    for data in _inflated(body):
        for text in _texts(data):
            try:
                # Bytes behind the object, such as a trailing NUL, do not make it less of an object.
                return _JSON.raw_decode(text.lstrip(_NOISE))[0]
            except (ValueError, RecursionError):
                continue
    return None


def _inflated(body: bytes) -> Iterator[bytes]:
    """Yield the body, or what it may inflate to: no JSON begins like gzip, and none inflates."""
    if not body.startswith(_GZIP):
        yield body
    for window in (_ANY_HEADER, _RAW):
        inflater = zlib.decompressobj(window)
        try:
            data = inflater.decompress(body, LARGEST_BODY)
        except zlib.error:
            continue
        if data and not inflater.unconsumed_tail:  # a bomb is not JSON
            yield data


def _texts(data: bytes) -> Iterator[str]:
    encoding = json.detect_encoding(data)
    try:
        yield data.decode(encoding)
    except UnicodeDecodeError:
        with suppress(UnicodeDecodeError):
            yield data.decode("gb18030")
        yield data.decode(encoding, errors="replace")


def _to_int(digits: str) -> float:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else math.inf


_JSON = json.JSONDecoder(strict=False, parse_int=_to_int)
