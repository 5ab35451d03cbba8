"""The rules as Prometheus itself reads and carries them out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.deploy.rules import CASES, FILES, FOLDER
from tests.monitoring.tools import find_promtool


def run_promtool(*arguments: str | Path) -> None:
    """Have promtool check something, and fail with all that it says."""
    done = subprocess.run([find_promtool(), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_rules(file: Path) -> None:
    """Prometheus takes each file of rules, and finds nothing to criticise."""
    run_promtool("check", "rules", "--lint=all", "--lint-fatal", file)


def test_config() -> None:
    """Prometheus takes the example of its configuration, with all the rules that it names."""
    run_promtool("check", "config", "--lint=all", "--lint-fatal", FOLDER / "prometheus.yaml")


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.name)
def test_cases(file: Path) -> None:
    """Each alert fires when it must, says what it must, and is quiet when it must be."""
    run_promtool("test", "rules", file)
