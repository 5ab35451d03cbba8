"""How values are shown to a person: aligned columns, times in UTC, money in yuan."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

NOTHING = "-"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns under their names. A column is aligned to the right if all that is known in it are numbers."""
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in head]
    return "\n".join(_lines([_column(name.upper(), cells) for name, cells in zip(head, columns, strict=True)]))


def card(*pairs: tuple[str, object]) -> str:
    """One thing: a line for each of its properties."""
    names = [f"{name}:" for name, _ in pairs]
    return "\n".join(_lines([_padded(names, right=False), [text(value) for _, value in pairs]]))


def text(value: object) -> str:
    """A value on one line."""
    match value:
        case None | "" | () | []:
            return NOTHING
        case bool():
            return "yes" if value else "no"
        case datetime():
            return value.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        case list() | tuple():
            return ", ".join(map(text, value))
        case _:
            return plain(str(value))


def plain(words: str) -> str:
    """Words from elsewhere on one line, without anything that steers a terminal."""
    return " ".join("".join(each if each.isprintable() else " " for each in words).split())


def _lines(columns: Sequence[Sequence[str]]) -> Iterable[str]:
    return ("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def _column(name: str, cells: Sequence[object]) -> Sequence[str]:
    known = [each for each in cells if each is not None]
    numbers = bool(known) and all(isinstance(each, int | float) and not isinstance(each, bool) for each in known)
    return _padded([name, *map(text, cells)], right=numbers)


def _padded(cells: Sequence[str], *, right: bool) -> Sequence[str]:
    width = max(map(_width, cells))
    blanks = [" " * (width - _width(each)) for each in cells]
    return [blank + each if right else each + blank for each, blank in zip(cells, blanks, strict=True)]


def _width(words: str) -> int:
    """How many cells of a terminal words take: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in words)
