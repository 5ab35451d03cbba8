"""The form of `gateway top` on a terminal: tables that fit its size."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any, Generic, TypeVar

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from service.cli.monitor import AccountFigures, Figures, GatewayFigures, TenantFigures

T = TypeVar("T")
_GAP = 2
_HEADING_LINES = 2
"""Of each table: an empty line and the names of its columns."""
_MIN_ROWS = 3
_MIB = 1 << 20
_PLAIN_WIDTH = 120
"""Of output that is no terminal."""
_NONE = "-"
_BAD, _POOR = "bold red", "yellow"


@dataclass(frozen=True)
class _Column(Generic[T]):
    """A column; those of a lower `rank` are left out last where the terminal is narrow."""

    title: str
    rank: int
    cell: Callable[[T], Text | str]
    is_number: bool = True


async def show_live(read: Callable[[], Awaitable[Figures]], interval: float) -> None:
    """Show the figures on the whole terminal at each interval, for ever."""
    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(render_figures(await read(), *console.size), refresh=True)
            await asyncio.sleep(interval)


def print_figures(figures: Figures) -> None:
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    console.print(render_figures(figures, console.width))


def render_figures(figures: Figures, width: int, height: int | None = None) -> RenderableType:
    """Return all figures within a size; rows that do not fit are counted."""
    notes = [(f"{item.url}: {item.error}", _BAD) for item in figures.gateways if item.error]
    notes += [(warning, _POOR) for warning in figures.warnings]
    parts: list[RenderableType] = [_render_head(figures)]
    parts += [Text(note, style=style, no_wrap=True, overflow="ellipsis") for note, style in notes]
    rows_left = None if height is None else height - len(parts)
    sections: Sequence[_Section[Any]] = [
        _Section(_GATEWAYS, figures.gateways),
        _Section(_ACCOUNTS, sorted(figures.accounts or (), key=_account_order)),
        _Section(_TENANTS, sorted(figures.tenants or (), key=_tenant_order)),
    ]
    for index, section in enumerate(sections):
        if section.rows:
            later = sum(_HEADING_LINES + min(len(item.rows), _MIN_ROWS) for item in sections[index + 1 :] if item.rows)
            shown = len(section.rows) if rows_left is None else max(rows_left - later - _HEADING_LINES, 1)
            table = section.render(width, shown)
            rows_left = None if rows_left is None else rows_left - _HEADING_LINES - len(table.rows)
            parts += ["", table]
    return Group(*parts)


class _Section(Generic[T]):
    def __init__(self, columns: Sequence[_Column[T]], rows: Sequence[T]) -> None:
        self.columns = columns
        self.rows = rows

    def render(self, width: int, max_rows: int) -> Table:
        """Return a table of that many lines below the heading at most."""
        cut = len(self.rows) > max_rows
        rows = self.rows[: max_rows - 1] if cut else self.rows
        cells = {column: [_to_text(column.cell(row)) for row in rows] for column in self.columns}
        columns = _fit(cells, width)
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), collapse_padding=True)
        for column in columns:
            table.add_column(
                column.title,
                justify="right" if column.is_number else "left",
                no_wrap=True,
                overflow="ellipsis",
                header_style="bold",
            )
        for line in zip(*(cells[column] for column in columns), strict=True):
            table.add_row(*line)
        if cut:
            table.add_row(Text(f"… {len(self.rows) - len(rows)} more", style="dim"))
        return table


def _fit(cells: dict[_Column[T], list[Text]], width: int) -> Sequence[_Column[T]]:
    """Return the columns that fit, in their order."""
    widths = {
        column: max(map(cell_len, [column.title, *(text.plain for text in texts)])) for column, texts in cells.items()
    }
    by_rank = sorted(cells, key=lambda column: column.rank)
    ends = accumulate(widths[column] + _GAP for column in by_rank)
    fitting = {column for column, end in zip(by_rank, ends, strict=True) if end - _GAP <= width}
    return [column for column in cells if column in fitting or column is by_rank[0]]


def _to_text(cell: Text | str) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _render_head(figures: Figures) -> Text:
    gateways, tasks = figures.gateways, figures.tasks
    up = sum(item.error is None for item in gateways)
    parts = [
        Text(f"{figures.at:%H:%M:%SZ}", style="bold"),
        Text(f"{up} of {len(gateways)} up", style=_BAD if up < len(gateways) else ""),
    ]
    rates = [item.requests_per_second for item in gateways if item.requests_per_second is not None]
    if rates:
        parts.append(Text(f"{sum(sum(rate.values()) for rate in rates):.1f} requests/s"))
    if tasks:
        kinds = ", ".join(f"{count} {kind}" for kind, count in tasks.running.items() if count)
        parts.append(Text(f"{sum(tasks.running.values())} running{f' ({kinds})' if kinds else ''}"))
        style = _BAD if tasks.overdue_seconds >= 60 else _POOR if tasks.overdue_seconds >= 30 else ""  # as the alerts
        late = "" if tasks.lag_seconds is None else f", {tasks.lag_seconds:.1f} s late"
        parts.append(Text(f"checks {tasks.overdue_seconds:.0f} s overdue{late}", style=style))
    return Text("  ", no_wrap=True, overflow="ellipsis").join(parts)


def _rate(name: str, style: str = "") -> Callable[[GatewayFigures], Text]:
    def format_rate(row: GatewayFigures) -> Text:
        if row.requests_per_second is None:
            return Text(_NONE)
        rate = row.requests_per_second.get(name, 0.0)
        return Text(f"{rate:.1f}", style=style if rate else "")

    return format_rate


def _format_uploads(row: GatewayFigures) -> Text:
    if not row.upload_limit_bytes:
        return Text(_NONE)
    used, limit = (row.upload_bytes or 0), row.upload_limit_bytes
    return Text(f"{used / _MIB:.0f}/{limit / _MIB:.0f} MiB", style=_POOR if used > 0.8 * limit else "")


def _format_number(value: float | None, digits: int = 0) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


def _format_days(days: float | None) -> Text:
    if days is None:
        return Text(_NONE)
    return Text(f"{days:.1f}" if days < 100 else f"{days:.0f}", style=_BAD if days < 1 else _POOR if days < 7 else "")


def _format_age(since: datetime | None) -> str:
    if since is None:
        return _NONE
    seconds = max(int((datetime.now(UTC) - since).total_seconds()), 0)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _account_order(row: AccountFigures) -> tuple[bool, float, str]:
    days = [days for days in (row.uses_days, row.yuan_days) if days is not None]
    return row.state == "open", max(days, default=float("inf")), row.name


def _tenant_order(row: TenantFigures) -> tuple[float, float, int, str]:
    return -sum(row.denials_per_minute.values()), -(row.used_ratio or 0), -row.running, row.name


def _format_denials(row: TenantFigures) -> Text:
    return Text(_format_number(sum(row.denials_per_minute.values()), 1), style=_POOR if row.denials_per_minute else "")


def _format_used(row: TenantFigures) -> Text:
    if row.used_ratio is None:
        return Text(_NONE)
    style = _BAD if row.used_ratio >= 0.95 else _POOR if row.used_ratio >= 0.8 else ""
    return Text(f"{row.used_ratio:.0%}", style=style)


_GATEWAYS: Sequence[_Column[GatewayFigures]] = (
    _Column("GATEWAY", 0, lambda row: row.url, is_number=False),
    _Column("2XX/S", 2, _rate("2xx")),
    _Column("4XX/S", 3, _rate("4xx", _POOR)),
    _Column("5XX/S", 1, _rate("5xx", _BAD)),
    _Column("OPEN", 5, lambda row: _format_number(row.in_progress)),
    _Column("UPLOADS", 4, lambda row: _format_number(row.uploads)),
    _Column("MEMORY", 7, _format_uploads),
    _Column("UP", 6, lambda row: _format_age(row.started_at)),
    _Column("VERSION", 8, lambda row: row.version or _NONE, is_number=False),
)
_ACCOUNTS: Sequence[_Column[AccountFigures]] = (
    _Column("ACCOUNT", 0, lambda row: row.name, is_number=False),
    _Column("STATE", 1, lambda row: Text(row.state, style="" if row.state == "open" else _BAD), is_number=False),
    _Column("USES", 4, lambda row: _format_number(row.uses)),
    _Column("DAYS", 2, lambda row: _format_days(row.uses_days)),
    _Column("YUAN", 5, lambda row: _format_number(row.yuan, 2)),
    _Column("DAYS", 3, lambda row: _format_days(row.yuan_days)),
    _Column("IN FLIGHT", 6, lambda row: str(row.in_flight)),
    _Column("UNKNOWN", 7, lambda row: Text(str(row.unknown), style=_POOR if row.unknown else "")),
)
_TENANTS: Sequence[_Column[TenantFigures]] = (
    _Column("TENANT", 0, lambda row: row.name, is_number=False),
    _Column("RUNNING", 3, lambda row: str(row.running)),
    _Column("DENIED/MIN", 1, _format_denials),
    _Column("BY", 5, lambda row: ", ".join(row.denials_per_minute), is_number=False),
    _Column("USED", 2, _format_used),
    _Column("OF", 4, lambda row: row.nearest_limit or "", is_number=False),
)
