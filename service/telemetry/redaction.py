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

from service.domain.tasks import Cipher
from service.domain.tenants import TOKEN_PREFIX
from service.domain.webhooks import SECRET_PREFIX

_MIN_SECRET_LENGTH = 8
"""A shorter spelling is not looked for: it would be found within ordinary words."""


_PERCENT_ESCAPE = re.compile(r"%[0-9A-F]{2}")


class KnownSecrets:
    """Secrets that are known, to be cut out of texts.

    A text is looked at in pieces of a fixed length, one after the other: each spelling is long enough to hold one of
    them, wherever it stands. Only a text with such a piece is searched, so that what that costs grows neither with the
    number of secrets nor with that of their spellings.
    """

    def __init__(self) -> None:
        self._secrets: set[str] = set()
        self._encodings: set[str] = set()
        self._fragments: set[str] = set()
        self._fragment_length = 0

    def add(self, secret: str) -> bool:
        """Know a secret from now on; False if it was known, or is too short to be told from an ordinary word."""
        if secret in self._secrets or len(secret) < _MIN_SECRET_LENGTH:
            return False
        self._secrets.add(secret)
        added = {each for each in encodings(secret) if len(each) >= _MIN_SECRET_LENGTH}
        self._encodings |= added
        # Of so many characters in a row, one piece that begins at a multiple of the length is whole.
        length = (min(map(len, self._encodings)) + 1) // 2
        if length != self._fragment_length:
            self._fragment_length, self._fragments, added = length, set(), self._encodings
        for each in added:
            self._fragments.update(each[start : start + length] for start in range(len(each) - length + 1))
        return True

    def replace_secrets(self, text: str, replacement: str) -> str:
        """A text with each spelling of a secret replaced."""
        length = self._fragment_length
        if not length or len(text) < length:
            return text
        if self._fragments.isdisjoint([text[start : start + length] for start in range(0, len(text), length)]):
            return text
        for spelling in sorted(self._encodings, key=len, reverse=True):  # a shorter one may be within a longer
            text = text.replace(spelling, replacement)
        return text


def encodings(secret: str) -> Iterator[str]:
    """A secret as it is, and as it looks in addresses, in literals of JSON and Python, in HTML, base64 and hex."""
    plain = secret.encode(errors="surrogatepass")
    yield secret
    yield html.escape(secret)
    for encoded in (quote(plain), quote(plain, safe=""), quote_plus(plain)):
        yield encoded
        yield _PERCENT_ESCAPE.sub(lambda found: found[0].lower(), encoded)
    for literal in (_json_literal, _ascii_json_literal, _python_literal, _ascii_literal, _bytes_literal):
        once = literal(secret)
        yield once
        yield literal(once)
    yield from hex_encodings(secret)
    yield from base64_encodings(plain)


def hex_encodings(text: str) -> tuple[str, str]:
    """A text as the hexadecimal digits of its bytes."""
    digits = text.encode(errors="surrogatepass").hex()
    return digits, digits.upper()


def base64_encodings(plain: bytes) -> Iterator[str]:
    """What is sure to stand in any base64 of something that holds these bytes, wherever in it."""
    for before in range(3):
        text = base64.b64encode(b"\0" * before + plain).rstrip(b"=").decode()
        first, last = -(-before * 8 // 6), (before + len(plain)) * 8 // 6
        yield text[first:last]
        yield text[first:last].replace("+", "-").replace("/", "_")


def _json_literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _ascii_json_literal(text: str) -> str:
    return json.dumps(text)[1:-1]


def _python_literal(text: str) -> str:
    return repr(text)[1:-1]


def _ascii_literal(text: str) -> str:
    return ascii(text)[1:-1]


def _bytes_literal(text: str) -> str:
    return repr(text.encode(errors="surrogatepass"))[2:-1]


REDACTED = "[redacted]"


_MAX_DEPTH = 12


_MIN_TOKEN_LENGTH = 20
"""All tokens and webhook secrets are longer, and most words are shorter."""


_NON_WORD = re.compile(r"[\s=:,?+%]")


_MAX_INTEGER = 2**63


_MAX_CACHED_NAMES = 1_000


_FREE_TEXT_NAMES = ("prompt", "metadata")


_SECRET_NAMES = (
    *("user[-_]?key", "api[-_]?key", "idempotency[-_]?key", "token", "authorization", "secret", "passw(?:or)?d"),
    *("cookie", *_FREE_TEXT_NAMES),
)


_SECRET_NAME = re.compile("|".join(_SECRET_NAMES), re.IGNORECASE)


_TOKEN_PREFIXES = (TOKEN_PREFIX, SECRET_PREFIX)


_BARE_TOKEN_PREFIXES = tuple(prefix.removesuffix("_") for prefix in _TOKEN_PREFIXES)


_TOKEN = re.compile(rf"{_BARE_TOKEN_PREFIXES[0]}(?:_|%5[Ff])\w+|{_BARE_TOKEN_PREFIXES[1]}(?:_|%5[Ff])[\w+/=%-]+")


_ENCODED_TOKEN_PREFIXES = {
    spelling for prefix in _TOKEN_PREFIXES for spelling in (*base64_encodings(prefix.encode()), *hex_encodings(prefix))
}


_ENCODED_TOKEN = re.compile(rf"(?:{'|'.join(map(re.escape, _ENCODED_TOKEN_PREFIXES))})[\w+/-]{{20,}}=*")


_CREDENTIALS = re.compile(r"\b(bearer|basic)(?:\s|%20|\+)+[^\s,;'\"]+", re.IGNORECASE)


_URL = re.compile(r"(://)([^\s\"<>\\]+)")


_QUERY = re.compile(r"(?<=[\w/])\?[^\s\"<>\\=?]*=[^\s\"<>\\]*")


# The parts of a form, as they stand in the body of a request; line ends may be escaped.
_LINE_END = r"(?:\\+r\\+n|\r?\n)"


_FORM_PART = re.compile(
    rf"(name=\\*\"[^\"\\]{{0,80}}\\*\"[^\r\n]{{0,300}}?{_LINE_END}{{2}}).*?(?={_LINE_END}--|\Z)", re.DOTALL
)


# `name=value`, `"name": "value"`, `("name", "value")` and the like in running text. What is quoted may be quoted once
# more, which escapes its quotes, and may have lost its end; a quote that is escaped differently is not the last one.
_QUOTED_VALUE = r"b?\"(?:[^\"\\]|\\+[^\\])*+(?:\"|\\*\Z)|b?'(?:[^'\\]|\\+[^\\])*+(?:'|\\*\Z)"


_ESCAPED_VALUE = r"(?>(?P<{0}>\\+[\"']).*?(?:(?<!\\)(?P={0})|\Z))"


_BRACED_VALUE = (
    rf"[{{\[(](?:[^{{}}()\[\]\"'\\]|{_QUOTED_VALUE}|{_ESCAPED_VALUE.format('inner')}|\\)*+(?:[}}\])]|\Z)|[{{\[(][^\n]*"
)


_NAMED_VALUE = re.compile(
    rf"((?:{'|'.join(_SECRET_NAMES)})[\w-]{{0,40}}"
    r"(?:(?:\\*[\"'])?\s{0,3}[=:]\s{0,3}|\\*[\"']\s{0,3},\s{0,3}(?=b?\\*[\"'])))"
    rf"(?:{_ESCAPED_VALUE.format('quote')}|{_QUOTED_VALUE}|{_BRACED_VALUE}|[^\s&,;)}}\]]+)",
    re.IGNORECASE | re.DOTALL,
)


_UNQUOTED_FREE_TEXT = re.compile(
    rf"((?:{'|'.join(_FREE_TEXT_NAMES)})[\w-]{{0,40}}\s{{0,3}}[=:]\s{{0,3}})(?!b?[\"'\\{{\[(])[^\n]+", re.IGNORECASE
)


_CONTROL_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class Redactor:
    """A processor for structlog that rewrites everything which is logged into plain values without secrets.

    It knows tokens and webhook secrets by their prefixes, values by the names they stand under, and the secrets it was
    told.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._known_secrets = KnownSecrets()
        self._name_cache: dict[str, tuple[str, bool]] = {}
        self.register_secrets(*secrets)

    def register_secrets(self, *secrets: str) -> None:
        """From now on these strings are not logged, in any of the spellings they come in."""
        for secret in secrets:
            if self._known_secrets.add(secret):
                self._name_cache.clear()

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Rewrite one event."""
        return self._redact_mapping(event, 0)

    def redact_text(self, text: str) -> str:
        """A text without secrets, in which every character can be encoded, and none of which steers a terminal."""
        # Most texts are short words. What can't match is not searched for: it makes a line cost a third.
        text = self._known_secrets.replace_secrets(text, REDACTED)
        if len(text) >= _MIN_TOKEN_LENGTH:
            text = _ENCODED_TOKEN.sub(REDACTED, _TOKEN.sub(REDACTED, text))
        if _NON_WORD.search(text):
            text = _redact_running_text(text)
        if not text.isprintable():
            text = text.translate(_CONTROL_ESCAPES)
        return text if text.isascii() else text.encode(errors="backslashreplace").decode()

    def _redact_value(self, value: Any, depth: int) -> Any:
        plain: Any
        if isinstance(value, str):
            plain = self.redact_text(str(value))
        elif value is None or isinstance(value, bool | float):
            plain = value
        elif isinstance(value, int):
            plain = int(value) if abs(value) < _MAX_INTEGER else str(value)
        elif isinstance(value, bytes | bytearray | memoryview):
            plain = f"<{len(value)} bytes>"
        elif depth > _MAX_DEPTH:
            plain = "..."
        elif isinstance(value, Mapping):
            plain = self._redact_mapping(value, depth)
        elif isinstance(value, list | tuple | set | frozenset):
            plain = self._redact_sequence(tuple(value), depth)
        elif isinstance(value, msgspec.Struct):
            plain = self._redact_mapping({name: getattr(value, name) for name in value.__struct_fields__}, depth)
        elif is_dataclass(value) and not isinstance(value, type):
            plain = self._redact_mapping({each.name: getattr(value, each.name) for each in fields(value)}, depth)
        else:
            plain = self.redact_text(repr(value))
        return plain

    def _redact_mapping(self, mapping: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        told: dict[str, Any] = {}
        for name, value in mapping.items():
            shown, secret = self._redact_name(name)
            told[shown] = REDACTED if secret and value is not None else self._redact_value(value, depth + 1)
        if depth and "value" in told and self._is_secret_name(mapping.get("name", mapping.get("key"))):
            told["value"] = REDACTED
        return told

    def _redact_sequence(self, values: Sequence[Any], depth: int) -> list[Any]:
        if len(values) == 2 and self._is_secret_name(values[0]):  # a header, or a field of a form
            return [self._redact_value(values[0], depth + 1), REDACTED]
        return [self._redact_value(each, depth + 1) for each in values]

    def _is_secret_name(self, name: Any) -> bool:
        return isinstance(name, str | bytes) and self._redact_name(name)[1]

    def _redact_name(self, name: Any) -> tuple[str, bool]:
        """A name as it is shown, and whether what stands under it is secret; the id of a token, say, is not."""
        text = str(name)
        known = self._name_cache.get(text)
        if known is None:
            known = self.redact_text(text), _SECRET_NAME.search(text) is not None and not text.endswith("_id")
            if len(self._name_cache) < _MAX_CACHED_NAMES:
                self._name_cache[text] = known
        return known


def _redact_running_text(text: str) -> str:
    """A text that is more than a word, without what its words tell to be secret."""
    if "://" in text:
        text = _URL.sub(_redact_url, text)
    if "?" in text:
        text = _QUERY.sub(f"?{REDACTED}", text)
    text = _CREDENTIALS.sub(rf"\1 {REDACTED}", text)
    if 'name="' in text or 'name=\\"' in text:
        text = _FORM_PART.sub(rf"\1{REDACTED}", text)
    if _SECRET_NAME.search(text):
        text = _UNQUOTED_FREE_TEXT.sub(rf"\1{REDACTED}", text)
        text = _NAMED_VALUE.sub(rf"\1{REDACTED}", text)
    return text


def _redact_url(found: re.Match[str]) -> str:
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


RegisterSecret = Callable[[str], None]
"""Has the log leave a secret out from now on."""


def noop(_: str) -> None:
    """Nobody keeps a log."""


class RecordingCipher:
    """A sealer that tells of each secret it seals or opens, as the text that `spell` makes of it."""

    def __init__(
        self, cipher: Cipher, register_secret: RegisterSecret, to_text: Callable[[bytes], str] = bytes.decode
    ) -> None:
        self._cipher = cipher
        self._register_secret = register_secret
        self._to_text = to_text

    def encrypt(self, plaintext: bytes) -> bytes:
        """Encrypt under the first key."""
        self._register_secret(self._to_text(plaintext))
        return self._cipher.encrypt(plaintext)

    def decrypt(self, ciphertext: bytes) -> bytes | None:
        """Decrypt under whichever key fits; None if none does or the bytes were altered."""
        plain = self._cipher.decrypt(ciphertext)
        if plain is not None:
            self._register_secret(self._to_text(plain))
        return plain
