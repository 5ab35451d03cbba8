"""Formatting of tables, records and values."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, BinaryIO

import click

from service.domain.tasks import Kind
from service.domain.tenants import Window

EMPTY_CELL = "-"


def format_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns under their names. A column is aligned to the right if all that is known in it are numbers."""
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in head]
    return "\n".join(
        _join_columns([_format_column(name.upper(), cells) for name, cells in zip(head, columns, strict=True)])
    )


def format_record(*pairs: tuple[str, object]) -> str:
    """One thing: a line for each of its properties."""
    names = [f"{name}:" for name, _ in pairs]
    return "\n".join(_join_columns([_pad_column(names, right=False), [format_value(value) for _, value in pairs]]))


def format_value(value: object) -> str:
    """A value on one line."""
    match value:
        case None | "" | () | []:
            return EMPTY_CELL
        case bool():
            return "yes" if value else "no"
        case datetime():
            return value.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        case list() | tuple():
            return ", ".join(map(format_value, value))
        case _:
            return single_line(str(value))


def single_line(words: str) -> str:
    """Words from elsewhere on one line, without anything that steers a terminal."""
    return " ".join("".join(each if each.isprintable() else " " for each in words).split())


def _join_columns(columns: Sequence[Sequence[str]]) -> Iterable[str]:
    return ("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def _format_column(name: str, cells: Sequence[object]) -> Sequence[str]:
    known = [each for each in cells if each is not None]
    numbers = bool(known) and all(isinstance(each, int | float) and not isinstance(each, bool) for each in known)
    return _pad_column([name, *map(format_value, cells)], right=numbers)


def _pad_column(cells: Sequence[str], *, right: bool) -> Sequence[str]:
    width = max(map(_display_width, cells))
    blanks = [" " * (width - _display_width(each)) for each in cells]
    return [blank + each if right else each + blank for each, blank in zip(cells, blanks, strict=True)]


def _display_width(words: str) -> int:
    """How many cells of a terminal words take: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in words)


MAX_SECRET_BYTES = 4_096
_SECONDS_BY_UNIT = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def read_secret(file: BinaryIO, option: str) -> str:
    """The secret that a file holds. Raises BadParameter."""
    try:
        value = file.read(MAX_SECRET_BYTES).decode().strip()
    except UnicodeDecodeError:
        value = ""
    if not value:
        raise click.BadParameter("must be a file that holds a key", param_hint=option)
    return value


class Yuan(click.ParamType[float]):
    """An amount of money such as `12` or `0.50`."""

    name = "yuan"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read it."""
        if isinstance(value, str) and not re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,2})?", value):
            self.fail("must be an amount in yuan such as 12 or 0.50", param, ctx)
        return float(value)


class Duration(click.ParamType[float]):
    """A time such as `90d`, `12h`, `30m` or, in seconds, `45`; as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read it."""
        if isinstance(value, int | float):
            return float(value)
        found = re.fullmatch(r"([0-9]{1,9})([smhdw]?)", str(value))
        if not found:
            self.fail("must be a duration such as 90d, 12h, 30m or 45 (seconds)", param, ctx)
        return float(int(found[1]) * _SECONDS_BY_UNIT[found[2]])


class Timestamp(click.ParamType[datetime]):
    """A moment such as `2030-01-31T12:00:00Z`: without a time zone it would be another one for each reader."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Read it."""
        try:
            moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
        except ValueError:
            moment = None
        if moment is None or moment.tzinfo is None:
            self.fail("must be a moment with a time zone, such as 2030-01-31T12:00:00Z", param, ctx)
        return moment


class Price(click.ParamType[tuple[str, float]]):
    """A kind of task and the most it can cost, such as `upscale=0.50`."""

    name = "kind=yuan"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Read it."""
        kind, _, amount = str(value).partition("=")
        if kind not in set(Kind):
            self.fail(f"must begin with a kind of task: {' or '.join(Kind)}", param, ctx)
        return kind, Yuan().convert(amount, param, ctx)


class Limit(click.ParamType[Mapping[str, Any]]):
    """What may be spent in a window, such as `day:tasks=100,money=50`; as the operators' API takes it."""

    name = "window:tasks=n,money=yuan"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Mapping[str, Any]:
        """Read it."""
        if isinstance(value, Mapping):
            return value
        window, _, rest = str(value).partition(":")
        if window not in set(Window):
            self.fail(f"must begin with a window: {' or '.join(Window)}", param, ctx)
        limit: dict[str, Any] = {"window": window}
        for each in rest.split(","):
            name, _, amount = each.partition("=")
            if name in limit or name not in {"tasks", "money"}:
                self.fail(f"must be a limit such as {window}:tasks=100,money=50", param, ctx)
            if name == "tasks" and not re.fullmatch(r"[0-9]{1,13}", amount):
                self.fail("must limit tasks to a whole number", param, ctx)
            limit[name] = int(amount) if name == "tasks" else Yuan().convert(amount, param, ctx)
        return limit
