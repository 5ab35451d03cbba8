"""The Prometheus rules, their test cases, and the runbook as data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
FOLDER = DEPLOY / "prometheus"
FILES: Sequence[Path] = sorted({*FOLDER.glob("alerts-*.yaml"), FOLDER / "recording.yaml"})
CASES: Sequence[Path] = sorted((FOLDER / "tests").glob("*.yaml"))

Rule = Mapping[str, Any]

_ENTRY = re.compile(r"^## (\w+)$", re.MULTILINE)


def rules() -> Sequence[Rule]:
    groups = [group for file in FILES for group in yaml.safe_load(file.read_text("utf-8"))["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> Sequence[Rule]:
    """Return the alerting rules. Several may share a name and differ in labels."""
    return [rule for rule in rules() if "alert" in rule]


@cache
def cases() -> Sequence[tuple[str, Sequence[Mapping[str, str]]]]:
    """Return the expected alerts of each test: the name, and the labels of those that fire."""
    tests = [test for file in CASES for test in yaml.safe_load(file.read_text("utf-8"))["tests"]]
    moments = [item for test in tests for item in test.get("alert_rule_test", ())]
    return [(moment["alertname"], [fired["exp_labels"] for fired in moment["exp_alerts"]]) for moment in moments]


def runbook_entries() -> Sequence[str]:
    return _ENTRY.findall((DEPLOY / "RUNBOOK.md").read_text("utf-8"))
