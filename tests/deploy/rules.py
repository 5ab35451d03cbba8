"""The rules for Prometheus, the cases they are tested with, and the runbook, as plain data."""

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
    """Every rule of every file."""
    groups = [group for file in FILES for group in yaml.safe_load(file.read_text("utf-8"))["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> Sequence[Rule]:
    """The rules that alert. Several may share a name; their labels tell them apart."""
    return [rule for rule in rules() if "alert" in rule]


@cache
def cases() -> Sequence[tuple[str, Sequence[Mapping[str, str]]]]:
    """What is expected of alerts at some moment: a name, and the labels of each that fires; none if it must not."""
    tests = [test for file in CASES for test in yaml.safe_load(file.read_text("utf-8"))["tests"]]
    moments = [each for test in tests for each in test.get("alert_rule_test", ())]
    return [(each["alertname"], [fired["exp_labels"] for fired in each["exp_alerts"]]) for each in moments]


def runbook_entries() -> Sequence[str]:
    """The names of the runbook's entries, in order."""
    return _ENTRY.findall((DEPLOY / "RUNBOOK.md").read_text("utf-8"))
