"""Faults of every sort for a minute, with an audit: `make chaos` in short."""

from __future__ import annotations

import secrets

import pytest

from tests.chaos.__main__ import format_report
from tests.chaos.run import Plan, run_once
from tests.chaos.traffic import OPERATOR_ACTIONS


@pytest.mark.parametrize("seed", [17, None])
def test_nothing_is_lost_or_paid_twice_under_faults(seed: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(secrets.randbelow(10**6) if seed is None else seed, seconds=60)
    with capsys.disabled():
        print(f"\n{plan.command}")  # noqa: T201
    history, vendor = run_once(plan)
    print(format_report(history, vendor))  # noqa: T201 - shown if it fails
    assert history.violations == []
    assert len([fault for fault in history.faults if fault.name not in OPERATOR_ACTIONS]) > 100
