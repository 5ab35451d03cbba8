"""HTML out of values. What is not markup is text, and text is escaped on its way in: there is no other way in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html import escape
from typing import Any, Literal

_VOID = frozenset({"input", "link", "meta", "wbr"})
_CODE = re.compile(r"`([^`]+)`")
_BULLET = re.compile(r"\s*[-*] ")
_KEY = re.compile(r'( *)("(?:[^"\\]|\\.)*")(: .*)')


class Html(str):
    """Markup; any other string is text."""

    __slots__ = ()


def join(parts: Iterable[str | None], between: str = "") -> Html:
    """Put parts one after the other; None is nothing."""
    return Html(_written(between).join(_written(part) for part in parts if part is not None))


def tag(name: str, /, *children: str | None, **attributes: str | Literal[True]) -> Html:
    """Make an element; `class_` is the attribute class, `aria_label` is aria-label, and True needs no value."""
    head = name
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        head += f" {attribute}" if value is True else f' {attribute}="{escape(value)}"'
    return Html(f"<{head}>") if name in _VOID else Html(f"<{head}>{join(children)}</{name}>")


def line(text: str) -> Html:
    """Text with `code` in it."""
    pieces = _CODE.split(text)
    return join(tag("code", piece) if index % 2 else piece for index, piece in enumerate(pieces))


def prose(text: str) -> Html:
    """Text of several paragraphs, with `code` and lists in it."""
    return join(_block(block) for block in re.split(r"\n\s*\n", text.strip()) if block)


def json_lines(value: Any) -> Html:
    """A value as indented JSON whose keys stand out."""
    lines = json.dumps(value, indent=2, ensure_ascii=False).split("\n")
    return join((_coloured(written) for written in lines), "\n")


def _block(block: str) -> Html:
    lines = block.split("\n")
    if not all(_BULLET.match(written) for written in lines):
        return tag("p", line(" ".join(written.strip() for written in lines)))
    return tag("ul", *(tag("li", line(_BULLET.sub("", written, count=1))) for written in lines))


def _coloured(written: str) -> Html:
    key = _KEY.fullmatch(written)
    return join([key[1], tag("b", key[2]), key[3]]) if key else join([written])


def _written(part: str | None) -> str:
    return part if isinstance(part, Html) else escape(part or "", quote=False)
