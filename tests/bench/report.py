"""The results of a run as tables, JSON, a results file and a plot."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import json

from service.devstack import find_server_binary
from tests.bench.comparison import ALL, API, HERE, OTHER, REFERENCES, Comparison, Result
from tests.bench.targets import BY_CPU, compare_targets, format_number, name_figure
from tests.bench.workloads import DIRECT, LARGE_ROWS, LARGE_SUBMIT, READ, SMALL_SUBMIT

FEW = 16
"""The connections of most loads."""
_COMPARED_FIGURES = ("per_second", "p99_ms", "cpu_ms", "peak_mb")
"""Figures shown as a ratio to the other checkout."""
_PAGE = """# Benchmark results

Written by `make bench` on {date}, of commit `{commit}`{compared}.

{machine}

The server under test is pinned to one CPU; the load generator, the vendor's stand-in and Valkey (with an append-only
file) share another. Servers alternate and restart in each round, and the figures are medians of {rounds} rounds of
{seconds} s where there are several. Images are PNGs of random pixels. *per second* counts answers of success only; what
else came is in the column *errors*, summed over all rounds. *cpu ms* is the CPU time of the server for one of them.
One token sends all requests, so the gateway runs with `GATEWAY_TENANT_SHARE=1` and `GATEWAY_READS_PER_SECOND=0`.
*added ms* is the median at one connection less that of the same request sent straight to the vendor's stand-in. *x* is
the ratio of *per second* to a reference, more is better: *x alone* to the same requests with nothing beside them, *x
capacity* to a closed loop of 16 connections; *by CPU* is the same ratio of the CPU times, which other work
changes less. MB are 10^6 bytes; *later* is 30 s after the last response, *later share* its ratio to *idle*. Times of
two runs differ by up to a fifth on a shared machine: compare within a run only.

![The main figures of this run](results.png)

"""


def describe_run(comparison: Comparison) -> dict[str, Any]:
    """Return what the figures depend on, without identifying the machine."""
    checkouts = {"commit": HERE} | ({OTHER: comparison.against} if comparison.against else {})
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    programs = {"wrk": ("wrk", "-v"), "nginx": ("/usr/sbin/nginx", "-v"), "gcc": ("cc", "-dumpfullversion")}
    programs["valkey"] = (str(find_server_binary()), "--version")
    return {
        **{name: _run("git", "-C", str(path), "describe", "--always", "--dirty") for name, path in checkouts.items()},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "rounds": comparison.rounds,
        "seconds": comparison.seconds,
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "kernel": platform.release().partition("-")[0],
        "versions": {"python": platform.python_version()}
        | {name: re.findall(r"\d+(?:\.\d+)+", _run(*command))[0] for name, command in programs.items()},
    }


def _run(*command: str) -> str:
    # wrk exits with an error after its version.
    return subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout.strip()


def add_ratios(results: Sequence[Result]) -> list[Result]:
    """Add the latency compared with a direct request, and the ratios to the references and the other checkout."""
    by_key = {(item.row, item.server, item.connections): item.figures for item in results}
    derived = []
    for result in results:
        figures = dict(result.figures)
        direct = by_key.get((result.row, DIRECT, 1))
        if direct and result.connections == 1 and result.server != DIRECT:
            figures["added_ms"] = figures["p50_ms"] - direct["p50_ms"]
        label = result.server.removeprefix(ALL)
        baselines = {f"x {reference}": (reference, result.connections) for reference in REFERENCES}
        if label != result.server:
            baselines[f"x {API}"] = f"{API}{label}", result.connections
        if result.connections > FEW:
            baselines[f"x {FEW} connections"] = result.server, FEW
        for name, (server, connections) in baselines.items():
            other = by_key.get((result.row, server, connections))
            if other and result.server not in {*REFERENCES, DIRECT} and other.get("per_second"):
                figures[name] = figures["per_second"] / other["per_second"]
                figures[name + BY_CPU] = other["cpu_ms"] / figures["cpu_ms"]
        other = by_key.get((result.row, f"{result.server} ({OTHER})", result.connections), {})
        figures |= {f"{name} x {OTHER}": figures[name] / other[name] for name in _COMPARED_FIGURES if other.get(name)}
        derived.append(replace(result, figures=figures))
    return derived


def format_tables(results: Sequence[Result], titles: Mapping[str, str]) -> str:
    """Format the table of targets and one for each workload as Markdown that is readable on a terminal."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
    tables = [f"### Targets\n\n{format_lines(compare_targets(results))}"]
    tables += [f"### {row}\n\n{titles[row]}\n\n{_format_table(found)}" for row, found in rows.items()]
    return "\n".join(tables)


def format_page(facts: Mapping[str, Any], tables: str) -> str:
    """Format the results as a page in Markdown."""
    other = f", compared with commit `{facts[OTHER]}` as *({OTHER})*" if OTHER in facts else ""
    return _PAGE.format_map({**facts, "machine": describe_machine(facts), "compared": other}) + tables


def describe_machine(facts: Mapping[str, Any]) -> str:
    """Return the machine and the versions of a run as a list in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"- machine: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, Linux {facts['kernel']}\n"
        f"- versions: {versions}, and those of the commit's `uv.lock`"
    )


def format_json(facts: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Format the results as JSON. A figure that could not be measured is null."""
    return json.format(json.encode({**facts, "results": results}), indent=1).decode() + "\n"


def _format_table(results: Sequence[Result]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result.figures))
    lines = [["server", "connections", *map(name_figure, names), "errors"]]
    for item in sorted(results, key=lambda entry: entry.connections):  # stable: servers stay in their order
        figures = [format_number(item.figures.get(name, math.nan)) for name in names]
        errors = ", ".join(f"{count} {what}" for what, count in item.errors.items())
        lines.append([item.server, str(item.connections or ""), *figures, errors])
    return format_lines(lines)


def format_lines(lines: Sequence[Sequence[str]]) -> str:
    """Format lines of cells, the first of them headings, without empty columns."""
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    aligned = []
    for place, (heading, *cells) in enumerate(columns):
        width = max(map(len, [heading, *cells]))
        align, rule = (str.rjust, "-" * (width - 1) + ":") if place else (str.ljust, "-" * width)
        aligned.append([align(heading, width), rule, *(align(cell, width) for cell in cells)])
    return "".join(f"| {' | '.join(line)} |\n" for line in zip(*aligned, strict=True))


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Draw throughput, CPU time, latency and memory of all servers into a PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only there for the benchmark
    from matplotlib.patches import Patch  # noqa: PLC0415

    at = {(item.row, item.server, item.connections): item.figures for item in results if item.server != DIRECT}
    submits, large = (READ, SMALL_SUBMIT, LARGE_SUBMIT), tuple(LARGE_ROWS.values())
    servers = dict.fromkeys(server for row, server, _ in at if row in {*submits, *large})
    colours = {server: f"C{place}" for place, server in enumerate(servers)}
    charts = [
        *((f"{row}: answers a second", "per_second", [(row, number) for number in (1, FEW)]) for row in submits),
        ("CPU time for one, ms (16 connections)", "cpu_ms", [(row, 16) for row in submits]),
        ("99 of 100 are answered within, ms (16 connections)", "p99_ms", [(row, 16) for row in submits]),
        ("largest memory, MB (images at once)", "peak_mb", [(row, 0) for row in large]),
    ]
    figure = Figure(figsize=(15, 9), layout="constrained", dpi=100)
    for axis, (heading, name, groups) in zip(figure.subplots(2, 3).flat, charts, strict=True):
        heights = {
            server: [at.get((row, server, number), {}).get(name, math.nan) for row, number in groups]
            for server in servers
        }
        heights = {server: values for server, values in heights.items() if not all(map(math.isnan, values))}
        labels = [f"{number} connections" if name == "per_second" else row for row, number in groups]
        if heights:
            axis.grouped_bar(heights, tick_labels=labels, colors=[colours[server] for server in heights])
        for container in axis.containers:
            axis.bar_label(container, fmt=format_number, rotation=90, fontsize=7, padding=2)
        axis.set(title=heading, yscale="log" if heights and name != "peak_mb" else "linear")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.18)
    handles = [Patch(color=colour, label=server) for server, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(servers), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, metadata={"Software": None})
