"""Redaction of secrets and of texts of callers in logs."""

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

from service.domain.tenants import TOKEN_PREFIX
from service.domain.webhooks import SECRET_PREFIX

_MIN_SECRET_LENGTH = 8
"""A shorter encoding would also match within ordinary words."""
_PERCENT_ESCAPE = re.compile(r"%[0-9A-F]{2}")


class KnownSecrets:
    """Registered secrets, to be replaced in texts.

    A text is split into fragments of a fixed length, and each encoding is long enough to contain one wherever it
    occurs. Only a text with a known fragment is searched, so that the cost does not grow with the number of secrets.
    """

    def __init__(self) -> None:
        self._secrets: set[str] = set()
        self._encodings: set[str] = set()
        self._fragments: set[str] = set()
        self._fragment_length = 0

    def add(self, secret: str) -> bool:
        """Register a secret; return False if it is already known or too short."""
        if secret in self._secrets or len(secret) < _MIN_SECRET_LENGTH:
            return False
        self._secrets.add(secret)
        added = {encoding for encoding in encodings(secret) if len(encoding) >= _MIN_SECRET_LENGTH}
        self._encodings |= added
        # An encoding of twice this length contains a whole fragment at any offset.
        length = (min(map(len, self._encodings)) + 1) // 2
        if length != self._fragment_length:
            self._fragment_length, self._fragments, added = length, set(), self._encodings
        for encoding in added:
            self._fragments.update(encoding[start : start + length] for start in range(len(encoding) - length + 1))
        return True

    def replace_secrets(self, text: str, replacement: str) -> str:
        length = self._fragment_length
        if not length or len(text) < length:
            return text
        if self._fragments.isdisjoint([text[start : start + length] for start in range(0, len(text), length)]):
            return text
        for encoding in sorted(self._encodings, key=len, reverse=True):  # a longer one may contain a shorter one
            text = text.replace(encoding, replacement)
        return text


_LITERALS: Sequence[Callable[[str], str]] = (
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    lambda text: repr(text)[1:-1],
    lambda text: ascii(text)[1:-1],
    lambda text: repr(text.encode(errors="surrogatepass"))[2:-1],
)


def encodings(secret: str) -> Iterator[str]:
    """Yield a secret as it is and as encoded in URLs, JSON and Python literals, HTML, base64 and hex."""
    plain = secret.encode(errors="surrogatepass")
    yield secret
    yield html.escape(secret)
    for encoded in (quote(plain), quote(plain, safe=""), quote_plus(plain)):
        yield encoded
        yield _PERCENT_ESCAPE.sub(lambda match: match[0].lower(), encoded)
    for literal in _LITERALS:
        once = literal(secret)
        yield once
        yield literal(once)
    yield from hex_encodings(secret)
    yield from base64_encodings(plain)


def hex_encodings(text: str) -> tuple[str, str]:
    digits = text.encode(errors="surrogatepass").hex()
    return digits, digits.upper()


def base64_encodings(plain: bytes) -> Iterator[str]:
    """Yield the characters common to all base64 texts of these bytes, at each of the three offsets."""
    for before in range(3):
        text = base64.b64encode(b"\0" * before + plain).rstrip(b"=").decode()
        first, last = -(-before * 8 // 6), (before + len(plain)) * 8 // 6
        yield text[first:last]
        yield text[first:last].replace("+", "-").replace("/", "_")


REDACTED = "[redacted]"
_MAX_DEPTH = 12
_MIN_TOKEN_LENGTH = 20
"""All tokens and webhook secrets are longer, most words are shorter."""
_NON_WORD = re.compile(r"[\s=:,?+%]")
_MAX_INTEGER = 2**63
_MAX_CACHED_NAMES = 1_000
_SECRET_NAME = re.compile(
    "user[-_]?key|api[-_]?key|idempotency[-_]?key|token|authorization|secret|passw(?:or)?d|cookie|prompt|metadata",
    re.IGNORECASE,
)
_TOKEN_PREFIXES = (TOKEN_PREFIX, SECRET_PREFIX)
_BARE_TOKEN_PREFIXES = tuple(prefix.removesuffix("_") for prefix in _TOKEN_PREFIXES)
_TOKEN = re.compile(rf"{_BARE_TOKEN_PREFIXES[0]}(?:_|%5[Ff])\w+|{_BARE_TOKEN_PREFIXES[1]}(?:_|%5[Ff])[\w+/=%-]+")
_ENCODED_TOKEN_PREFIXES = {
    encoding for prefix in _TOKEN_PREFIXES for encoding in (*base64_encodings(prefix.encode()), *hex_encodings(prefix))
}
_ENCODED_TOKEN = re.compile(rf"(?:{'|'.join(map(re.escape, _ENCODED_TOKEN_PREFIXES))})[\w+/-]{{20,}}=*")
_CREDENTIALS = re.compile(r"\b(bearer|basic)(?:\s|%20|\+)+[^\s,;'\"]+", re.IGNORECASE)
_URL = re.compile(r"(://)([^\s\"<>\\]+)")
_QUERY = re.compile(r"(?<=[\w/])\?[^\s\"<>\\=?]*=[^\s\"<>\\]*")
# `name=value`, `"name": "value"`, `("name", "value")` and similar, to the end of the line: values contain quotes.
_NAMED_VALUE = re.compile(
    rf"((?:{_SECRET_NAME.pattern})[\w-]{{0,40}}(?:\s{{0,3}}[=:]|\\*[\"']\s{{0,3}}[=:,])\s{{0,3}})[^\n]+", re.IGNORECASE
)
_CONTROL_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class Redactor:
    """A structlog processor that turns events into plain values without secrets.

    Recognises tokens and webhook secrets by prefix, values by their names, and registered secrets.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._known_secrets = KnownSecrets()
        self._name_cache: dict[str, tuple[str, bool]] = {}
        self.register_secrets(*secrets)

    def register_secrets(self, *secrets: str) -> None:
        """Redact these strings from now on, in any encoding."""
        for secret in secrets:
            if self._known_secrets.add(secret):
                self._name_cache.clear()

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return self._redact_mapping(event, 0)

    def redact_text(self, text: str) -> str:
        """Return a text without secrets, encodable and without terminal control characters."""
        # Most texts are short words. Skipping patterns that can't match saves two thirds of the time.
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
            plain = self._redact_mapping({field.name: getattr(value, field.name) for field in fields(value)}, depth)
        else:
            plain = self.redact_text(repr(value))
        return plain

    def _redact_mapping(self, mapping: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        redacted: dict[str, Any] = {}
        for name, value in mapping.items():
            shown_name, is_secret = self._redact_name(name)
            redacted[shown_name] = REDACTED if is_secret and value is not None else self._redact_value(value, depth + 1)
        if depth and "value" in redacted and self._is_secret_name(mapping.get("name", mapping.get("key"))):
            redacted["value"] = REDACTED
        return redacted

    def _redact_sequence(self, values: Sequence[Any], depth: int) -> list[Any]:
        if len(values) == 2 and self._is_secret_name(values[0]):  # a header or form field
            return [self._redact_value(values[0], depth + 1), REDACTED]
        return [self._redact_value(value, depth + 1) for value in values]

    def _is_secret_name(self, name: Any) -> bool:
        return isinstance(name, str | bytes) and self._redact_name(name)[1]

    def _redact_name(self, name: Any) -> tuple[str, bool]:
        """Return the redacted name and whether its value is secret; the id of a token is not."""
        text = str(name)
        known = self._name_cache.get(text)
        if known is None:
            known = self.redact_text(text), _SECRET_NAME.search(text) is not None and not text.endswith("_id")
            if len(self._name_cache) < _MAX_CACHED_NAMES:
                self._name_cache[text] = known
        return known


def _redact_running_text(text: str) -> str:
    if "://" in text:
        text = _URL.sub(_redact_url, text)
    if "?" in text:
        text = _QUERY.sub(f"?{REDACTED}", text)
    text = _CREDENTIALS.sub(rf"\1 {REDACTED}", text)
    if _SECRET_NAME.search(text):
        text = _NAMED_VALUE.sub(rf"\1{REDACTED}", text)
    return text


def _redact_url(match: re.Match[str]) -> str:
    """Remove user info, query and fragment of a URL."""
    address, suffix = match[2], ""
    for mark in "?#":
        address, separator, removed = address.partition(mark)
        if removed:
            suffix = f"{separator}{REDACTED}"
    authority, slash, path = address.partition("/")
    if "@" in authority:
        authority = f"{REDACTED}@{authority.rpartition('@')[2]}"
    return f"{match[1]}{authority}{slash}{path}{suffix}"
