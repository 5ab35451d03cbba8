"""Faults of every sort for a minute, with an audit: `make chaos` in short."""

from __future__ import annotations

import secrets

import pytest

from tests.chaos.__main__ import format_report
from tests.chaos.run import Plan, run_once


@pytest.mark.parametrize("seed", [17, None])
def test_nothing_is_lost_or_paid_twice_under_faults(seed: int | None) -> None:
    plan = Plan(secrets.randbelow(10**6) if seed is None else seed, seconds=60)
    print(plan.command)  # noqa: T201 - shown if it fails
    history, vendor = run_once(plan)
    print(format_report(history, vendor))  # noqa: T201
    assert history.violations == []
    assert len(history.faults) > 200
