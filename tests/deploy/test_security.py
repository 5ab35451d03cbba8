"""SECURITY.md: each threat has an asset, a control and a test that exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def list_tests(file: str) -> set[str]:
    tree = ast.parse((_ROOT / file).read_text("utf-8"))
    return {item.name for item in tree.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_threat_has_a_test() -> None:
    """Each row has four cells, the last one only names of tests, and no threat is listed twice."""
    lines = (_ROOT / "deploy" / "SECURITY.md").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, rule = ["asset", "threat", "control", "test"], ["---"] * 4
    threats = [row for row in rows if row not in (head, rule)]
    assert len(threats) >= 32
    assert len({tuple(row[:2]) for row in threats}) == len(threats)
    for row in threats:
        assert len(row) == 4, row
        assert all(row), row
        assert _TEST.sub("", row[3]).replace(", ", "") == "", row
        for file, name in _TEST.findall(row[3]):
            assert name in list_tests(file), f"{file}::{name}"
