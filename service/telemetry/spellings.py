"""The spellings in which a secret may turn up, and finding them quickly however many there are."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator
from urllib.parse import quote, quote_plus

_SHORTEST = 8
"""A shorter spelling is not looked for: it would be found within ordinary words."""
_PERCENT = re.compile(r"%[0-9A-F]{2}")


class KnownSecrets:
    """Secrets that are known, to be cut out of texts.

    A text is looked at in pieces of a fixed length, one after the other: each spelling is long enough to hold one of
    them, wherever it stands. Only a text with such a piece is searched, so that what that costs grows neither with the
    number of secrets nor with that of their spellings.
    """

    def __init__(self) -> None:
        self._secrets: set[str] = set()
        self._spellings: set[str] = set()
        self._pieces: set[str] = set()
        self._length = 0

    def add(self, secret: str) -> bool:
        """Know a secret from now on; False if it was known, or is too short to be told from an ordinary word."""
        if secret in self._secrets or len(secret) < _SHORTEST:
            return False
        self._secrets.add(secret)
        added = {each for each in spellings(secret) if len(each) >= _SHORTEST}
        self._spellings |= added
        # Of so many characters in a row, one piece that begins at a multiple of the length is whole.
        length = (min(map(len, self._spellings)) + 1) // 2
        if length != self._length:
            self._length, self._pieces, added = length, set(), self._spellings
        for each in added:
            self._pieces.update(each[start : start + length] for start in range(len(each) - length + 1))
        return True

    def without(self, text: str, instead: str) -> str:
        """A text with each spelling of a secret replaced."""
        length = self._length
        if not length or len(text) < length:
            return text
        if self._pieces.isdisjoint([text[start : start + length] for start in range(0, len(text), length)]):
            return text
        for spelling in sorted(self._spellings, key=len, reverse=True):  # a shorter one may be within a longer
            text = text.replace(spelling, instead)
        return text


def spellings(secret: str) -> Iterator[str]:
    """A secret as it is, and as it looks in addresses, in literals of JSON and Python, in HTML, base64 and hex."""
    plain = secret.encode(errors="surrogatepass")
    yield secret
    yield html.escape(secret)
    for encoded in (quote(plain), quote(plain, safe=""), quote_plus(plain)):
        yield encoded
        yield _PERCENT.sub(lambda found: found[0].lower(), encoded)
    for literal in (_in_json, _in_ascii_json, _in_python, _in_ascii, _in_bytes):
        once = literal(secret)
        yield once
        yield literal(once)
    yield from in_hex(secret)
    yield from in_base64(plain)


def in_hex(text: str) -> tuple[str, str]:
    """A text as the hexadecimal digits of its bytes."""
    digits = text.encode(errors="surrogatepass").hex()
    return digits, digits.upper()


def in_base64(plain: bytes) -> Iterator[str]:
    """What is sure to stand in any base64 of something that holds these bytes, wherever in it."""
    for before in range(3):
        text = base64.b64encode(b"\0" * before + plain).rstrip(b"=").decode()
        first, last = -(-before * 8 // 6), (before + len(plain)) * 8 // 6
        yield text[first:last]
        yield text[first:last].replace("+", "-").replace("/", "_")


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _in_ascii_json(text: str) -> str:
    return json.dumps(text)[1:-1]


def _in_python(text: str) -> str:
    return repr(text)[1:-1]


def _in_ascii(text: str) -> str:
    return ascii(text)[1:-1]


def _in_bytes(text: str) -> str:
    return repr(text.encode(errors="surrogatepass"))[2:-1]
