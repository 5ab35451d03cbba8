"""Redaction of secrets in logs and messages."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any
from urllib.parse import quote, quote_plus

import msgspec

from service.domain.tasks import Sealer
from service.domain.tenants import TOKEN_PREFIX
from service.domain.webhooks import SECRET_PREFIX

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


REDACTED = "[redacted]"


_DEEPEST = 12


_SHORTEST_TOKEN = 20
"""All tokens and webhook secrets are longer, and most words are shorter."""


_NO_WORD = re.compile(r"[\s=:,?+%]")


_LARGEST_INTEGER = 2**63


_MOST_NAMES = 1_000


_PROSE = ("prompt", "metadata")


_NAMES = (
    *("user[-_]?key", "api[-_]?key", "idempotency[-_]?key", "token", "authorization", "secret", "passw(?:or)?d"),
    *("cookie", *_PROSE),
)


_SECRET_NAME = re.compile("|".join(_NAMES), re.IGNORECASE)


_PREFIXES = (TOKEN_PREFIX, SECRET_PREFIX)


_BARE_PREFIXES = tuple(prefix.removesuffix("_") for prefix in _PREFIXES)


_TOKEN = re.compile(rf"{_BARE_PREFIXES[0]}(?:_|%5[Ff])\w+|{_BARE_PREFIXES[1]}(?:_|%5[Ff])[\w+/=%-]+")


_ENCODED_PREFIXES = {spelling for prefix in _PREFIXES for spelling in (*in_base64(prefix.encode()), *in_hex(prefix))}


_ENCODED_TOKEN = re.compile(rf"(?:{'|'.join(map(re.escape, _ENCODED_PREFIXES))})[\w+/-]{{20,}}=*")


_CREDENTIALS = re.compile(r"\b(bearer|basic)(?:\s|%20|\+)+[^\s,;'\"]+", re.IGNORECASE)


_ADDRESS = re.compile(r"(://)([^\s\"<>\\]+)")


_QUERY = re.compile(r"(?<=[\w/])\?[^\s\"<>\\=?]*=[^\s\"<>\\]*")


# The parts of a form, as they stand in the body of a request; line ends may be escaped.
_LINE_END = r"(?:\\+r\\+n|\r?\n)"


_PART = re.compile(
    rf"(name=\\*\"[^\"\\]{{0,80}}\\*\"[^\r\n]{{0,300}}?{_LINE_END}{{2}}).*?(?={_LINE_END}--|\Z)", re.DOTALL
)


# `name=value`, `"name": "value"`, `("name", "value")` and the like in running text. What is quoted may be quoted once
# more, which escapes its quotes, and may have lost its end; a quote that is escaped differently is not the last one.
_QUOTED = r"b?\"(?:[^\"\\]|\\+[^\\])*+(?:\"|\\*\Z)|b?'(?:[^'\\]|\\+[^\\])*+(?:'|\\*\Z)"


_ESCAPED = r"(?>(?P<{0}>\\+[\"']).*?(?:(?<!\\)(?P={0})|\Z))"


_BRACED = rf"[{{\[(](?:[^{{}}()\[\]\"'\\]|{_QUOTED}|{_ESCAPED.format('inner')}|\\)*+(?:[}}\])]|\Z)|[{{\[(][^\n]*"


_NAMED = re.compile(
    rf"((?:{'|'.join(_NAMES)})[\w-]{{0,40}}"
    r"(?:(?:\\*[\"'])?\s{0,3}[=:]\s{0,3}|\\*[\"']\s{0,3},\s{0,3}(?=b?\\*[\"'])))"
    rf"(?:{_ESCAPED.format('quote')}|{_QUOTED}|{_BRACED}|[^\s&,;)}}\]]+)",
    re.IGNORECASE | re.DOTALL,
)


_UNQUOTED_PROSE = re.compile(
    rf"((?:{'|'.join(_PROSE)})[\w-]{{0,40}}\s{{0,3}}[=:]\s{{0,3}})(?!b?[\"'\\{{\[(])[^\n]+", re.IGNORECASE
)


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class Redactor:
    """A processor for structlog that rewrites everything which is logged into plain values without secrets.

    It knows tokens and webhook secrets by their prefixes, values by the names they stand under, and the secrets it was
    told.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._known = KnownSecrets()
        self._names: dict[str, tuple[str, bool]] = {}
        self.learn(*secrets)

    def learn(self, *secrets: str) -> None:
        """From now on these strings are not logged, in any of the spellings they come in."""
        for secret in secrets:
            if self._known.add(secret):
                self._names.clear()

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Rewrite one event."""
        return self._mapping(event, 0)

    def text(self, text: str) -> str:
        """A text without secrets, in which every character can be encoded, and none of which steers a terminal."""
        # Most texts are short words. What can't match is not searched for: it makes a line cost a third.
        text = self._known.without(text, REDACTED)
        if len(text) >= _SHORTEST_TOKEN:
            text = _ENCODED_TOKEN.sub(REDACTED, _TOKEN.sub(REDACTED, text))
        if _NO_WORD.search(text):
            text = _running(text)
        if not text.isprintable():
            text = text.translate(_CONTROLS)
        return text if text.isascii() else text.encode(errors="backslashreplace").decode()

    def _value(self, value: Any, depth: int) -> Any:
        plain: Any
        if isinstance(value, str):
            plain = self.text(str(value))
        elif value is None or isinstance(value, bool | float):
            plain = value
        elif isinstance(value, int):
            plain = int(value) if abs(value) < _LARGEST_INTEGER else str(value)
        elif isinstance(value, bytes | bytearray | memoryview):
            plain = f"<{len(value)} bytes>"
        elif depth > _DEEPEST:
            plain = "..."
        elif isinstance(value, Mapping):
            plain = self._mapping(value, depth)
        elif isinstance(value, list | tuple | set | frozenset):
            plain = self._sequence(tuple(value), depth)
        elif isinstance(value, msgspec.Struct):
            plain = self._mapping({name: getattr(value, name) for name in value.__struct_fields__}, depth)
        elif is_dataclass(value) and not isinstance(value, type):
            plain = self._mapping({each.name: getattr(value, each.name) for each in fields(value)}, depth)
        else:
            plain = self.text(repr(value))
        return plain

    def _mapping(self, mapping: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        told: dict[str, Any] = {}
        for name, value in mapping.items():
            shown, secret = self._name(name)
            told[shown] = REDACTED if secret and value is not None else self._value(value, depth + 1)
        if depth and "value" in told and self._names_secret(mapping.get("name", mapping.get("key"))):
            told["value"] = REDACTED
        return told

    def _sequence(self, values: Sequence[Any], depth: int) -> list[Any]:
        if len(values) == 2 and self._names_secret(values[0]):  # a header, or a field of a form
            return [self._value(values[0], depth + 1), REDACTED]
        return [self._value(each, depth + 1) for each in values]

    def _names_secret(self, name: Any) -> bool:
        return isinstance(name, str | bytes) and self._name(name)[1]

    def _name(self, name: Any) -> tuple[str, bool]:
        """A name as it is shown, and whether what stands under it is secret; the id of a token, say, is not."""
        text = str(name)
        known = self._names.get(text)
        if known is None:
            known = self.text(text), _SECRET_NAME.search(text) is not None and not text.endswith("_id")
            if len(self._names) < _MOST_NAMES:
                self._names[text] = known
        return known


def _running(text: str) -> str:
    """A text that is more than a word, without what its words tell to be secret."""
    if "://" in text:
        text = _ADDRESS.sub(_shown_address, text)
    if "?" in text:
        text = _QUERY.sub(f"?{REDACTED}", text)
    text = _CREDENTIALS.sub(rf"\1 {REDACTED}", text)
    if 'name="' in text or 'name=\\"' in text:
        text = _PART.sub(rf"\1{REDACTED}", text)
    if _SECRET_NAME.search(text):
        text = _UNQUOTED_PROSE.sub(rf"\1{REDACTED}", text)
        text = _NAMED.sub(rf"\1{REDACTED}", text)
    return text


def _shown_address(found: re.Match[str]) -> str:
    """An address without its query, its fragment, and who is named before its host."""
    address, rest = found[2], ""
    for mark in "?#":
        address, found_mark, more = address.partition(mark)
        if more:
            rest = f"{found_mark}{REDACTED}"
    authority, slash, path = address.partition("/")
    if "@" in authority:
        authority = f"{REDACTED}@{authority.rpartition('@')[2]}"
    return f"{found[1]}{authority}{slash}{path}{rest}"


Learn = Callable[[str], None]
"""Has the log leave a secret out from now on."""


def unheard(_: str) -> None:
    """Nobody keeps a log."""


class Overheard:
    """A sealer that tells of each secret it seals or opens, as the text that `spell` makes of it."""

    def __init__(self, sealer: Sealer, learn: Learn, spell: Callable[[bytes], str] = bytes.decode) -> None:
        self._sealer = sealer
        self._learn = learn
        self._spell = spell

    def seal(self, plain: bytes) -> bytes:
        """Encrypt under the first key."""
        self._learn(self._spell(plain))
        return self._sealer.seal(plain)

    def open(self, sealed: bytes) -> bytes | None:
        """Decrypt under whichever key fits; None if none does or the bytes were altered."""
        plain = self._sealer.open(sealed)
        if plain is not None:
            self._learn(self._spell(plain))
        return plain
