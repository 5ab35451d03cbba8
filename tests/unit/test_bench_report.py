"""The tables of the benchmark, which itself is not part of CI."""

from __future__ import annotations

from click.testing import CliRunner

from tests.bench.__main__ import main
from tests.bench.comparison import API, LUA, OTHER, Result
from tests.bench.report import add_ratios, format_page, format_tables
from tests.bench.workloads import READ, WORKLOADS


def test_targets_are_shown_with_the_figures_of_both_checkouts() -> None:
    before = Result(READ, f"{API} ({OTHER})", 16, {"per_second": 2_000, "cpu_ms": 0.5, "p99_ms": 12.0}, {})
    after = Result(READ, API, 16, {"per_second": 6_000, "cpu_ms": 0.1, "p99_ms": 2.5}, {})
    reference = Result(READ, LUA, 16, {"per_second": 40_000, "cpu_ms": 0.02}, {})

    table = format_tables(add_ratios([after, before, reference]), {READ: "A task is read."}).partition("### read")[0]

    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    assert [f"{READ}, 16 connections: x {LUA}", ">= 0.15, aim 0.2", "0.050", "0.150", "yes", "0.200"] in cells
    assert [f"{READ}, 16 connections: p99 ms", "<= 5, aim 3", "12.0", "2.50", "aim", ""] in cells
    assert [f"{READ}, 1 connection: p50 ms", "<= 0.4, aim 0.3", "", "", "no", ""] in cells


def test_the_command_offers_every_workload() -> None:
    usage = CliRunner().invoke(main, ["--help"]).output

    assert not [name for name in WORKLOADS if name not in usage]


def test_page_names_both_commits() -> None:
    facts = {"commit": "c0ffee", "date": "2026-11-29", "rounds": 3, "seconds": 3}
    facts |= {"cpu": "A", "cores": 2, "memory_gib": 4, "kernel": "6.1", "versions": {"python": "3.11"}}
    assert "of commit `c0ffee`." in format_page(facts, "")
    page = format_page(facts | {OTHER: "beef"}, "| read |")
    assert "`c0ffee`, compared with commit `beef` as" in page
    assert page.endswith("| read |")
