"""Keeps secrets, and what callers wrote, out of the log."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any
from urllib.parse import quote

import msgspec

from service.domain.tenancy import TOKEN_PREFIX
from service.domain.webhook import SECRET_PREFIX

REDACTED = "[redacted]"

_SHORTEST = 6
"""A shorter secret is not looked for: it would be found within ordinary words."""
_DEEPEST = 12
_LARGEST_INTEGER = 2**63

_NAMES = ("user[-_]?key", "api[-_]?key", "token", "authorization", "secret", "password", "prompt", "cookie")
_SECRET_NAME = re.compile("|".join(_NAMES), re.IGNORECASE)
_TOKEN = re.compile(rf"{TOKEN_PREFIX}\w+|{SECRET_PREFIX}[\w+/=-]+")
_CREDENTIALS = re.compile(r"\b(bearer|basic)\s+[^\s,;'\"]+", re.IGNORECASE)
_USER_INFO = re.compile(r"://[^/@\s]+@")
# `name=value`, `"name": "value"` and the like in running text; the quotes may themselves be escaped.
_NAMED = re.compile(
    rf"((?:{'|'.join(_NAMES)})[\w-]{{0,40}}(?:\\*[\"'])?\s{{0,3}}[=:]\s{{0,3}})"
    r"(\\+[\"'].*?\\+[\"']|b?\"(?:[^\"\\]|\\.)*\"|b?'(?:[^'\\]|\\.)*'|[^\s&,;)}\]]+)",
    re.IGNORECASE | re.DOTALL,
)


class Redactor:
    """A processor for structlog that rewrites everything which is logged into plain values without secrets.

    It knows tokens and webhook secrets by their prefixes, values by the names they stand under, and the secrets it was
    told.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._spellings: set[str] = set()
        self._known: re.Pattern[str] | None = None
        self.learn(*secrets)

    def learn(self, *secrets: str) -> None:
        """From now on these strings are not logged, in any of the spellings they come in."""
        for secret in secrets:
            if len(secret) >= _SHORTEST:
                self._spellings |= {secret, quote(secret), quote(secret, safe=""), repr(secret)[1:-1]}
        longest_first = sorted(self._spellings, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Rewrite one event."""
        return self._mapping(event, 0)

    def text(self, text: str) -> str:
        """A text without secrets, in which every character can be encoded."""
        # Most texts are short words. What can't match is not searched for: it makes a line cost a third.
        if self._known:
            text = self._known.sub(REDACTED, text)
        if TOKEN_PREFIX in text or SECRET_PREFIX in text:
            text = _TOKEN.sub(REDACTED, text)
        if len(text.split(None, 1)) > 1:
            text = _CREDENTIALS.sub(rf"\1 {REDACTED}", text)
        if "@" in text:
            text = _USER_INFO.sub(f"://{REDACTED}@", text)
        if "=" in text or ":" in text:
            text = _NAMED.sub(rf"\1{REDACTED}", text)
        return text if text.isascii() else text.encode(errors="backslashreplace").decode()

    def _value(self, value: Any, depth: int) -> Any:
        plain: Any
        if value is None or isinstance(value, bool | float):
            plain = value
        elif isinstance(value, int):
            plain = int(value) if abs(value) < _LARGEST_INTEGER else str(value)
        elif isinstance(value, str):
            plain = self.text(str(value))
        elif isinstance(value, bytes | bytearray | memoryview):
            plain = f"<{len(value)} bytes>"
        elif depth > _DEEPEST:
            plain = "..."
        elif isinstance(value, Mapping):
            plain = self._mapping(value, depth)
        elif isinstance(value, list | tuple | set | frozenset):
            plain = [self._value(each, depth + 1) for each in value]
        elif isinstance(value, msgspec.Struct):
            plain = self._mapping({name: getattr(value, name) for name in value.__struct_fields__}, depth)
        elif is_dataclass(value) and not isinstance(value, type):
            plain = self._mapping({each.name: getattr(value, each.name) for each in fields(value)}, depth)
        else:
            plain = self.text(repr(value))
        return plain

    def _mapping(self, mapping: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        return {
            self.text(str(name)): REDACTED
            if value is not None and _is_secret(str(name))
            else self._value(value, depth + 1)
            for name, value in mapping.items()
        }


def _is_secret(name: str) -> bool:
    """Whether what stands under a name is secret; the id of a token, say, is not."""
    return _SECRET_NAME.search(name) is not None and not name.endswith("_id")
