"""The plot of a run's main figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from tests.bench.bursts import LARGE_ROWS
from tests.bench.candidates import ALL, API, API_AND_WORKER, FASTAPI, LUA, PROXY
from tests.bench.closed_loops import CONNECTIONS, DIRECT, LARGE_SUBMIT, READ, SMALL_SUBMIT
from tests.bench.comparison import OTHER, Result

_MAIN = (READ, SMALL_SUBMIT, LARGE_SUBMIT)
_CONNECTIONS = 16
_OTHER = f" ({OTHER})"
_COLOURS = {
    API: ("#1b4f9c", "#7b3fa0"),
    ALL: ("#5b8fd6", "#b98ad0"),
    API_AND_WORKER: ("#a9c6ec", "#d8c2e6"),
    PROXY: ("#9a9a9a", ""),
    LUA: ("#4a9a57", ""),
    FASTAPI: ("#d9822b", ""),
}
"""Colours by server, for this and the other checkout."""


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Draw throughput, CPU time, latency and memory of all servers into a PNG."""
    mpl.use("agg")
    measured = [
        result for result in results if result.row in {*_MAIN, *LARGE_ROWS.values()} and result.server != DIRECT
    ]
    servers = list(dict.fromkeys(item.server for item in measured))
    colours = {server: _COLOURS[server.removesuffix(_OTHER)][server.endswith(_OTHER)] for server in servers}
    figure = Figure(figsize=(15, 9), layout="constrained", dpi=100)
    axes = figure.subplots(2, 3)
    at = {(result.row, result.server, result.connections): result.figures for result in results}
    for axis, row in zip(axes[0], _MAIN, strict=True):
        values = {
            server: [at.get((row, server, number), {}).get("per_second") for number in CONNECTIONS]
            for server in servers
        }
        _bars(axis, [str(number) for number in CONNECTIONS], values, colours)
        axis.set(title=f"{row}: answers a second", xlabel="connections", yscale="log")
    for axis, name, heading in (
        (axes[1][0], "cpu_ms", f"CPU time for one, ms ({_CONNECTIONS} connections)"),
        (axes[1][1], "p99_ms", f"99 of 100 are answered within, ms ({_CONNECTIONS} connections)"),
    ):
        values = {server: [at.get((row, server, _CONNECTIONS), {}).get(name) for row in _MAIN] for server in servers}
        _bars(axis, _MAIN, values, colours)
        axis.set(title=heading, yscale="log")
    memory = {
        server: [at.get((row, server, 0), {}).get("peak_mib") for row in LARGE_ROWS.values()] for server in servers
    }
    _bars(axes[1][2], list(LARGE_ROWS.values()), memory, colours)
    axes[1][2].set(title="largest memory, MiB (images at once)")
    handles = [mpl.patches.Patch(color=colours[server], label=server) for server in servers]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(servers), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, metadata={"Software": None})


def _bars(axis: Any, groups: Sequence[str], values: dict[str, list[float | None]], colours: dict[str, str]) -> None:
    """Draw a group of bars for each name, one bar per server with its value above."""
    text = {server: found for server, found in values.items() if any(found)}
    width = 0.86 / max(len(text), 1)
    for place, (server, result) in enumerate(text.items()):
        for group, value in enumerate(result):
            if value:
                x = group + (place - (len(text) - 1) / 2) * width
                axis.bar(x, value, width * 0.94, color=colours[server])
                axis.annotate(
                    _format_value(value),
                    (x, value),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=7,
                    rotation=90,
                )
    axis.set_xticks(range(len(groups)), groups)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.margins(y=0.18)


def _format_value(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
