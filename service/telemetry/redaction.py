"""Redaction of secrets and of texts of callers in logs."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from itertools import chain
from typing import Any
from urllib.parse import quote_plus

import msgspec

from service.domain.tenants import TOKEN_PREFIX
from service.domain.webhooks import SECRET_PREFIX

_MIN_SECRET_LENGTH = 8
"""A shorter encoding would also match within ordinary words."""
_MAX_STRIDE = 16
_OCTET_ESCAPE = r"(?:%(?:25){0,8}|\\{1,8}+(?:x|u00))"
"""Before two hex digits in URLs, escaped any number of times, and in literals of Python and JSON."""
_ESCAPE = re.compile(
    rf"{_OCTET_ESCAPE}([0-9a-f]{{2}})|&#(?:x0{{0,6}}([0-9a-f]{{2}})|0{{0,6}}([0-9]{{2,3}}));", re.IGNORECASE
)


def replace_secret(secret: str, replacement: str, text: str) -> str:
    """Return a text without a secret, however it is spelled.

    Found in any case, with any of its characters escaped for URLs, literals or HTML, and within base64 and hex.
    """
    return _spelling_pattern(secret).sub(replacement, text)


class KnownSecrets:
    """Registered secrets, to be replaced in texts.

    A text is sampled at regular distances; distance and length of samples are so short that each encoding of a secret
    contains a whole one. Only a text with a sample of a secret is searched for it, so that the cost does not grow with
    the number of secrets.
    """

    def __init__(self) -> None:
        self._secrets: set[str] = set()
        self._samples: dict[str, tuple[str, ...]] = {}
        """The secrets that a sample may be part of."""
        self._min_length = 0
        self._stride = self._sample_length = 0

    def add(self, secret: str) -> bool:
        """Register a secret; return False if it is already known or too short."""
        if secret in self._secrets or len(secret) < _MIN_SECRET_LENGTH:
            return False
        self._secrets.add(secret)
        length, added = min(map(len, encodings(secret))), {secret}
        if not self._min_length or length < self._min_length:
            self._min_length, self._stride = length, min(length // 2, _MAX_STRIDE)
            self._sample_length = length - self._stride + 1
            self._samples, added = {}, self._secrets
        for item in added:
            for encoding in encodings(item):
                for start in range(self._stride):
                    sample = encoding[start : start + self._sample_length]
                    secrets = self._samples.get(sample, ())
                    self._samples[sample] = secrets if item in secrets else (*secrets, item)
        return True

    def replace_secrets(self, text: str, replacement: str) -> str:
        if len(text) < self._min_length or not self._secrets:
            return text
        views = [text.lower()]
        if "%" in text or "\\" in text or "&#" in text:
            views.append(_ESCAPE.sub(_unescape, text).lower())
        for view in views:
            if not self._samples.keys().isdisjoint(self._split(view)):
                return self._replace_found(text, replacement, views)
        return text

    def _split(self, view: str) -> list[str]:
        length = self._sample_length
        return [view[start : start + length] for start in range(0, len(view), self._stride)]

    def _replace_found(self, text: str, replacement: str, views: Sequence[str]) -> str:
        samples = chain.from_iterable(map(self._split, views))
        candidates = {secret for sample in samples for secret in self._samples.get(sample, ())}
        for secret in sorted(candidates, key=len, reverse=True):  # one may contain another
            if any(encoding in view for encoding in encodings(secret) for view in views):
                text = replace_secret(secret, replacement, text)
        return text


def _unescape(match: re.Match[str]) -> str:
    return chr(int(match[3]) if match[3] else int(match[1] or match[2], 16))


_LITERALS: Sequence[Callable[[str], str]] = (
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    lambda text: repr(text)[1:-1],
    lambda text: ascii(text)[1:-1],
    lambda text: repr(text.encode(errors="surrogatepass"))[2:-1],
)


def encodings(secret: str) -> set[str]:
    """Return a secret as it is and as encoded in literals, HTML, forms, base64 and hex, all in lower case."""
    plain = secret.encode(errors="surrogatepass")
    found = {secret, plain.decode("latin-1"), html.escape(secret), quote_plus(plain)}
    for literal in _LITERALS:
        once = literal(secret)
        found |= {once, literal(once)}
    for cased in {secret, secret.lower(), secret.upper()}:
        cased_plain = cased.encode(errors="surrogatepass")
        found |= {cased_plain.hex(), *base64_encodings(cased_plain)}
    return {secret.lower(), *(encoding.lower() for encoding in found if len(encoding) >= _MIN_SECRET_LENGTH)}


@lru_cache(maxsize=1_000)
def _spelling_pattern(secret: str) -> re.Pattern[str]:
    if not secret:
        return re.compile(r"(?!)")
    encoded = (
        "".join(character if character.isalnum() else _spell(character) for character in encoding)
        for encoding in sorted(encodings(secret), key=len, reverse=True)
    )
    return re.compile("|".join(("".join(map(_spell, secret)), *encoded)), re.IGNORECASE)


def _spell(character: str) -> str:
    """Return a pattern of a character in both cases, as it is and as escapes."""
    spellings = []
    for cased in sorted({character.lower(), character.upper()}):
        octets = cased.encode(errors="surrogatepass")
        spellings.append("".join(f"{_OCTET_ESCAPE}{octet:02x}" for octet in octets))
        if len(octets) == 1:
            spellings.append(rf"&\#(?:x0{{0,6}}{octets[0]:x}|0{{0,6}}{octets[0]});")
    return f"(?:{'|'.join(spellings)}|{re.escape(character)})"  # an escape may begin with the character


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


class SafeText(str):
    """A text that can hold no secret, as the gateway made it itself: it is logged as it is."""

    __slots__ = ()


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
        self._word_cache: dict[str, str] = {}
        self.register_secrets(*secrets)

    def register_secrets(self, *secrets: str) -> None:
        """Redact these strings from now on, in any encoding."""
        for secret in secrets:
            if self._known_secrets.add(secret):
                self._name_cache.clear()
                self._word_cache.clear()

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return self._redact_mapping(event, 0)

    def redact_text(self, text: str) -> str:
        """Return a text without secrets, encodable and without terminal control characters."""
        if isinstance(text, SafeText):
            return str(text)
        text = str(text)  # the value of an enum
        # Most texts are short words. Skipping patterns that can't match saves two thirds of the time.
        text = self._known_secrets.replace_secrets(text, REDACTED)
        if len(text) >= _MIN_TOKEN_LENGTH:
            text = _ENCODED_TOKEN.sub(REDACTED, _TOKEN.sub(REDACTED, text))
        if _NON_WORD.search(text):
            text = _redact_running_text(text)
        if not text.isprintable():
            text = text.translate(_CONTROL_ESCAPES)
        return text if text.isascii() else text.encode(errors="backslashreplace").decode()

    def redact_word(self, word: str | None) -> str | None:
        """Redact a text that recurs, at the cost of a lookup."""
        if word is None:
            return None
        known = self._word_cache.get(word)
        if known is None:
            if len(self._word_cache) >= _MAX_CACHED_NAMES:
                self._word_cache.clear()
            known = self._word_cache[word] = self.redact_text(word)
        return known

    def _redact_value(self, value: Any, depth: int) -> Any:
        plain: Any
        if isinstance(value, str):
            plain = self.redact_text(value)
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
