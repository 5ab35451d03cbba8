"""The results of a run as tables, JSON, a results file and a plot."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.comparison import ALL, API, API_AND_WORKER, FASTAPI, LUA, OTHER, PROXY, REFERENCES, Result
from tests.bench.workloads import CONNECTIONS, DIRECT, LARGE_ROWS, LARGE_SUBMIT, READ, SMALL_SUBMIT

_HEADINGS = {
    "per_second": "done/s",
    "capacity_per_second": "capacity/s",
    "offered_per_second": "offered/s",
    "added_ms": "added ms",
    "cpu_ms": "CPU ms each",
    "cpu_percent": "CPU %",
    "late_p50_ms": "late p50 ms",
    "late_p99_ms": "late p99 ms",
    "idle_mib": "idle MiB",
    "peak_mib": "peak MiB",
    "later_mib": "30 s later MiB",
    "health_max_ms": "health max ms",
    "ops_health_max_ms": "operators' health max ms",
    "put_tenant_p50_ms": "PUT tenant p50 ms",
    "task_bytes": "bytes each",
    "start_ms": "start ms",
}
_COMPARED_FIGURES = ("per_second", "p99_ms", "late_p99_ms", "cpu_ms", "peak_mib")
"""Figures shown as a ratio to the other checkout."""
_METHOD = """The server under test is pinned to one CPU; the load generator, the vendor's stand-in, Valkey (with an
append-only file) and the worker of `api + worker` share another. Servers alternate and restart in each round, and
the figures are medians of {rounds} rounds where there are several. Images are PNGs of random pixels. *done/s* counts
answers of success only; what else came is in the column *errors*, summed over all rounds. *CPU ms each* is the CPU time
of the server for one of them. *added ms* is the median at one connection less that of the same request sent straight to
the vendor's stand-in. *x* is the ratio of *done/s* to a reference, more is better. Times of two runs differ by up to a
fifth on a shared machine: compare within a run only.
"""


def describe_run(commits: Mapping[str, str], versions: Mapping[str, str], command: str, rounds: int) -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        **commits,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": command,
        "rounds": rounds,
        "machine": _describe_machine(),
        "versions": {name: version for name, version in versions.items() if version and name != "kernel"},
    }


def add_ratios(results: Sequence[Result]) -> list[Result]:
    """Add the latency compared with a direct request, and the ratios to the references and the other checkout."""
    by_key = {(item.row, item.server, item.connections): item.figures for item in results}
    derived = []
    for result in results:
        figures = dict(result.figures)
        direct = by_key.get((result.row, DIRECT, 1))
        if direct and result.connections == 1 and result.server != DIRECT:
            figures["added_ms"] = figures["p50_ms"] - direct["p50_ms"]
        for reference in REFERENCES:
            other = by_key.get((result.row, reference, result.connections))
            if other and result.server not in {*REFERENCES, DIRECT} and other.get("per_second"):
                figures[f"x {reference}"] = figures["per_second"] / other["per_second"]
        other = by_key.get((result.row, f"{result.server} ({OTHER})", result.connections), {})
        figures |= {f"{name} x {OTHER}": figures[name] / other[name] for name in _COMPARED_FIGURES if other.get(name)}
        derived.append(Result(result.row, result.server, result.connections, figures, result.errors))
    return derived


def format_tables(results: Sequence[Result], titles: Mapping[str, str]) -> str:
    """Format a table for each workload as Markdown that is readable on a terminal."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
    return "\n".join(f"### {row}\n\n{titles.get(row, '')}\n\n{_format_table(found)}" for row, found in rows.items())


def format_results(facts: Mapping[str, Any], results: Sequence[Result], titles: Mapping[str, str], plot: str) -> str:
    """Format the results as a page in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    others = f", compared with commit `{facts[OTHER]}` as *({OTHER})*" if OTHER in facts else ""
    return "\n".join(
        (
            "# Benchmark results",
            "",
            f"Written by `{facts['command']}` on {facts['date']}, of commit `{facts['commit']}`{others}.",
            "",
            "- machine: {cpu}, {cores} cores, {memory_gib} GiB, Linux {kernel}".format(**facts["machine"]),
            f"- versions: {versions}",
            "",
            _METHOD.format(rounds=facts["rounds"]),
            f"![The main figures of this run]({plot})",
            "",
            format_tables(results, titles),
        )
    )


def format_json(facts: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Format the results as JSON. A figure that could not be measured is null."""
    listed = [
        {
            "workload": result.row,
            "server": result.server,
            "connections": result.connections or None,
            "figures": {name: None if math.isnan(value) else round(value, 4) for name, value in result.figures.items()},
            "errors": result.errors,
        }
        for result in results
    ]
    return json.dumps({**facts, "results": listed}, indent=1) + "\n"


def _format_table(results: Sequence[Result]) -> str:
    several = any(result.connections for result in results)
    names = list(dict.fromkeys(name for result in results for name in result.figures))
    ordered = sorted(results, key=lambda entry: entry.connections)  # stable: servers stay in their order
    lines = [["server", *(["connections"] if several else []), *(_format_heading(name) for name in names), "errors"]]
    for item in ordered:
        cells = [_format_number(item.figures.get(name)) for name in names]
        errors = ", ".join(f"{count} {what}" for what, count in item.errors.items())
        lines.append([item.server, *([str(item.connections)] if several else []), *cells, errors])
    if not any(result.errors for result in results):
        lines = [line[:-1] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths[:1]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    return "".join(f"| {' | '.join(_align_cells(line, widths))} |\n" for line in lines)


def _align_cells(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.rjust(width) if at else cell.ljust(width)
        for at, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


def _format_heading(name: str) -> str:
    base, compared, _ = name.partition(f" x {OTHER}")
    return _HEADINGS.get(base, base.replace("_", " ")) + compared


def _format_number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def _describe_machine() -> dict[str, Any]:
    """Describe the machine without identifying it."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30),
        "kernel": platform.release().partition("-")[0],
    }


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
    import matplotlib as mpl  # noqa: PLC0415 - only there for the benchmark
    from matplotlib.figure import Figure  # noqa: PLC0415

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
