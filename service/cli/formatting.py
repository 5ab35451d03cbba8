"""Formatting of output, and parsing of option values."""

from __future__ import annotations

import re
import unicodedata
from calendar import monthrange
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime
from enum import StrEnum
from typing import Any, BinaryIO, TypeVar

import click
import msgspec

from service.client import single_line
from service.domain.tasks import Kind
from service.domain.tenants import Window

EMPTY_CELL = "-"
T = TypeVar("T")
Fields = Sequence[tuple[str, object]]


def format_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format columns with headings. A column of numbers is aligned to the right."""
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in head]
    return _join_columns([_format_column(name.upper(), cells) for name, cells in zip(head, columns, strict=True)])


def format_record(*pairs: tuple[str, object]) -> str:
    """Format one line for each name and value."""
    names = [f"{name}:" for name, _ in pairs]
    return _join_columns([_pad_column(names, right=False), [format_value(value) for _, value in pairs]])


def format_value(value: object) -> str:
    match value:
        case None | "" | () | []:
            return EMPTY_CELL
        case bool():
            return "yes" if value else "no"
        case datetime():
            return value.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        case float() if value.is_integer():
            return str(int(value))
        case list() | tuple():
            return ", ".join(map(format_value, value))
        case _:
            return single_line(str(value))


def format_json(value: object) -> str:
    """Format the output of `--json`, which is documented as stable: fields are only added."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def format_number(number: int, noun: str) -> str:
    """Format a number with its noun, whose plural ends in s."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _join_columns(columns: Sequence[Sequence[str]]) -> str:
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def _format_column(name: str, cells: Sequence[object]) -> Sequence[str]:
    values = [cell for cell in cells if cell is not None]
    is_numeric = bool(values) and all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in values)
    return _pad_column([name, *map(format_value, cells)], right=is_numeric)


def _pad_column(cells: Sequence[str], *, right: bool) -> Sequence[str]:
    width = max(map(_display_width, cells))
    padding = [" " * (width - _display_width(cell)) for cell in cells]
    return [blank + cell if right else cell + blank for cell, blank in zip(cells, padding, strict=True)]


def _display_width(text: str) -> int:
    # Chinese characters take two cells of a terminal.
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


MAX_SECRET_BYTES = 4_096
_SECONDS_BY_UNIT = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def read_secret(file: BinaryIO, option: str) -> str:
    """Read a secret of at most `MAX_SECRET_BYTES`. Raises BadParameter."""
    try:
        value = file.read(MAX_SECRET_BYTES).decode().strip()
    except UnicodeDecodeError:
        value = ""
    if not value:
        raise click.BadParameter("must be a file with a key", param_hint=option)
    return value


def choice(values: type[StrEnum]) -> click.Choice[str]:
    return click.Choice([value.value for value in values])


class OptionType(click.types.FuncParamType[str, T]):
    """Type of the values that `parse` returns or refuses with BadParameter; the help shows `name`."""

    def __init__(self, name: str, parse: Callable[[str], T]) -> None:
        super().__init__(parse)
        self.name = name


def _parse_yuan(text: str, rule: str = "must be") -> float:
    """Parse an amount of money such as `12` or `0.50`."""
    if not re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,2})?", text):
        raise click.BadParameter(f"{rule} an amount in yuan such as 12 or 0.50")
    return float(text)


def _parse_duration(text: str) -> float:
    """Parse a duration such as `90d`, `12h`, `30m` or `45` into seconds."""
    match = re.fullmatch(r"([0-9]{1,9})([smhdw]?)", text)
    if not match:
        raise click.BadParameter("must be a duration such as 90d, 12h, 30m or 45 (seconds)")
    return float(int(match[1]) * _SECONDS_BY_UNIT[match[2]])


def _parse_timestamp(text: str) -> datetime:
    with suppress(ValueError):
        timestamp = datetime.fromisoformat(text)
        if timestamp.tzinfo:
            return timestamp
    raise click.BadParameter("must be a timestamp with a time zone, such as 2030-01-31T12:00:00Z")


def _parse_month(text: str) -> tuple[date, date]:
    """Parse a month such as `2026-11`. Return its first and last day."""
    with suppress(ValueError):
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}", text):
            first = date.fromisoformat(f"{text}-01")
            return first, first.replace(day=monthrange(first.year, first.month)[1])
    raise click.BadParameter("must be a month such as 2026-11")


def _parse_price(text: str) -> tuple[str, float]:
    """Parse a kind of task and its maximum price in yuan, such as `upscale=0.50`."""
    kind, _, amount = text.partition("=")
    if kind not in set(Kind):
        raise click.BadParameter(f"must begin with a kind of task: {' or '.join(Kind)}")
    return kind, _parse_yuan(amount, "must end with")


_NO_LIMIT = "none"


def _parse_percentages(text: str) -> list[int]:
    """Parse percentages such as `80/95`, or `none`."""
    if text == _NO_LIMIT:
        return []
    if not re.fullmatch(r"[1-9][0-9]{0,2}(/[1-9][0-9]{0,2})*", text):
        raise click.BadParameter("must warn at percentages such as 80/95")
    return [int(percent) for percent in text.split("/")]


def _parse_limit(text: str) -> tuple[str, Mapping[str, Any]]:
    """Parse a limit such as `day:tasks=100,money=none`. Return its window, and its form in the operators' API."""
    window, _, rest = text.partition(":")
    if window not in set(Window):
        raise click.BadParameter(f"must begin with a window: {' or '.join(Window)}")
    limit: dict[str, Any] = {"window": window}
    for part in rest.split(","):
        name, _, amount = part.partition("=")
        if name in limit or name not in {"tasks", "money", "warn_at"}:
            raise click.BadParameter(f"must be a limit such as {window}:tasks=100,money=50,warn_at=80/95")
        if name == "warn_at":
            limit[name] = _parse_percentages(amount)
            continue
        if amount == _NO_LIMIT:
            limit[name] = None
            continue
        if name == "tasks" and not re.fullmatch(r"[0-9]{1,13}", amount):
            raise click.BadParameter("must limit tasks to a whole number")
        limit[name] = int(amount) if name == "tasks" else _parse_yuan(amount, "must limit money to")
    return window, limit


YUAN = OptionType("yuan", _parse_yuan)
DURATION = OptionType("duration", _parse_duration)
TIMESTAMP = OptionType("timestamp", _parse_timestamp)
MONTH = OptionType("month", _parse_month)
PRICE = OptionType("kind=yuan", _parse_price)
LIMIT = OptionType("window:tasks=n,money=yuan,warn_at=percent", _parse_limit)
