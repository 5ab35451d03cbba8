"""`make chaos`: one run with its report; a violation is repeated with fewer faults and less time."""

from __future__ import annotations

import secrets
import signal
import sys
from collections.abc import Iterator
from itertools import chain

import click
from msgspec.structs import replace

from tests.chaos.faults import PROCESS_FAULTS
from tests.chaos.history import Fault, History, Violation
from tests.chaos.run import ALL_FAULTS, Plan, run_once
from tests.chaos.stores import TOPOLOGIES
from tests.chaos.traffic import OPERATOR_ACTIONS
from tests.chaos.vendor import Vendor

_COLUMNS = ("fault", "times", "requests", "tasks", "lost", "double", "over-admitted", "other")
_COUNTED_RULES = ("lost", "double", "over-admitted")
MAX_REPLAYS = 8
_MIN_SECONDS = 5
_RECENT_SECONDS = 10.0


@click.command()
@click.option("--seconds", type=click.FloatRange(1, 3600), default=300, show_default=True, envvar="CHAOS_SECONDS")
@click.option("--seed", type=int, default=None, envvar="CHAOS_SEED", help="Default: random.")
@click.option(
    "--topology",
    type=click.Choice(TOPOLOGIES),
    default="single",
    show_default=True,
    envvar="TOPOLOGY",
)
@click.option("--faults", default="", envvar="CHAOS_FAULTS", help="Only these, separated by commas.")
@click.option("--replays", default=MAX_REPLAYS, show_default=True, help="Runs to shorten a violation, at most.")
def main(seconds: float, seed: int | None, topology: str, faults: str, replays: int) -> None:
    """Inject faults into gateways, store, vendor, callers and receivers, then compare the ledger with the vendor."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that all processes are ended
    names = tuple(faults.split(",")) if faults else ALL_FAULTS
    if unknown := sorted(set(names) - set(ALL_FAULTS)):
        raise click.BadParameter(
            f"unknown: {', '.join(unknown)}; known: {', '.join(ALL_FAULTS)}", param_hint="CHAOS_FAULTS"
        )
    plan = Plan(secrets.randbelow(10**6) if seed is None else seed, seconds, topology, names)
    click.echo(f"{plan.command}: {seconds:.0f} s of faults, then the audit")
    history, vendor = run_once(plan)
    click.echo(format_report(history, vendor))
    if history.violations:
        shortest = shorten(plan, history, replays)
        click.echo(f"repeat: {shortest.command}")
        sys.exit(1)


def format_report(history: History, vendor: Vendor) -> str:
    """Return a table of the faults, the totals, and the violations."""
    rows = [_COLUMNS, *(_format_row(name, history, vendor) for name in sorted({item.name for item in history.faults}))]
    injected = sum(item.name not in OPERATOR_ACTIONS for item in history.faults)
    totals = [
        f"{injected:,} faults, {history.requests:,} requests, {len(vendor.tasks):,} tasks",
        ", ".join(f"{rule} {_count(history.violations, rule)}" for rule in _COUNTED_RULES),
    ]
    if "store-killed" in {item.name for item in history.faults}:
        totals.append(f"ledger-unavailable until {measure_outage(history):.1f} s after a primary was killed, at most")
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    found = [_format_violation(item, history) for item in sorted(history.violations, key=lambda item: item.at)]
    logs = [f"logs: {history.folder}"] if history.folder else []
    return "\n".join([*lines, "", *totals, *found, *logs])


def _format_violation(violation: Violation, history: History) -> str:
    """Return a violation with the faults of processes in the time before it."""
    before = [
        f"{fault.name} {fault.started_at - history.started_at:.2f}-{fault.ended_at - history.started_at:.2f}"
        for fault in history.faults
        if fault.name in PROCESS_FAULTS and fault.started_at <= violation.at <= fault.ended_at + _RECENT_SECONDS
    ]
    at = f"{violation.at - history.started_at:.1f} s"
    return f"{violation.rule} at {at}: {violation.detail}; before: {', '.join(before) or 'nothing'}"


def measure_outage(history: History) -> float:
    """Return the longest time in seconds from a killed primary to the last `ledger-unavailable` because of it.

    Answers of gateways that were stopped at the same time are late for that reason.
    """
    kills = [fault for fault in history.faults if fault.name == "store-killed"]
    return max(
        (
            attempt.ended_at - kill.started_at
            for kill in kills
            for attempt in history.attempts
            if attempt.code == "ledger-unavailable"
            and kill.started_at <= attempt.started_at <= kill.ended_at
            and not history.is_affected("gateway-stopped", attempt.started_at, attempt.ended_at)
        ),
        default=0.0,
    )


def _format_row(name: str, history: History, vendor: Vendor) -> tuple[str, ...]:
    """Return a row: attempts and tasks that a fault of this name hit, and violations about them or during it."""
    faults = [fault for fault in history.faults if fault.name == name]
    hit = {fault.content for fault in faults if fault.content}
    attempts = [
        attempt
        for attempt in history.attempts
        if attempt.content in hit or any(_overlaps(fault, attempt.started_at, attempt.ended_at) for fault in faults)
    ]
    contents = {attempt.content for attempt in attempts}
    violations = [item for item in history.violations if item.contents & contents or _is_during(item, faults)]
    counts = [_count(violations, rule) for rule in _COUNTED_RULES]
    tasks = sum(len(vendor.accepted(content)) for content in contents)
    numbers = (len(faults), len(attempts), tasks, *counts, len(violations) - sum(counts))
    return (name, *map(str, numbers))


def _overlaps(fault: Fault, start: float, end: float) -> bool:
    return not fault.content and fault.started_at <= end and fault.ended_at >= start


def _is_during(violation: Violation, faults: list[Fault]) -> bool:
    return any(_overlaps(fault, violation.at, violation.at) for fault in faults)


def _count(violations: list[Violation], rule: str) -> int:
    return sum(violation.rule == rule for violation in violations)


def shorten(plan: Plan, history: History, replays: int) -> Plan:
    """Repeat a violation with less time and half of the faults; return the shortest plan that still violated a rule."""
    first = min(history.violations, key=lambda item: item.at)
    until_then = replace(plan, seconds=min(plan.seconds, max(first.at - history.started_at, 0) + 5))
    candidates: Iterator[Plan] = chain([until_then], _halve(until_then))
    for _ in range(replays):
        if (candidate := next(candidates, None)) is None:
            break
        repeated, _vendor = run_once(candidate)
        click.echo(f"{len(repeated.violations)} violations: {candidate.command}")
        if repeated.violations:
            plan, candidates = candidate, _halve(candidate)
    return plan


def _halve(plan: Plan) -> Iterator[Plan]:
    """Yield the plan with either half of its faults, then with half of its time."""
    middle = len(plan.faults) // 2
    if middle:
        yield replace(plan, faults=plan.faults[:middle])
        yield replace(plan, faults=plan.faults[middle:])
    if plan.seconds > _MIN_SECONDS:
        yield replace(plan, seconds=plan.seconds / 2)


if __name__ == "__main__":
    main()
