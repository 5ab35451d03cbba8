"""The rules, read and evaluated by Prometheus' own tools."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.deploy.rules import CASES, FILES, FOLDER
from tests.monitoring.tools import find_promtool


def run_promtool(*arguments: str | Path) -> None:
    """Run promtool, which must succeed without warnings."""
    done = subprocess.run([find_promtool(), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_rules(file: Path) -> None:
    run_promtool("check", "rules", "--lint=all", "--lint-fatal", file)


def test_config() -> None:
    """Prometheus accepts the example configuration with all its rule files."""
    run_promtool("check", "config", "--lint=all", "--lint-fatal", FOLDER / "prometheus.yaml")


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.name)
def test_cases(file: Path) -> None:
    """Each alert fires when it must, with the right annotations, and not otherwise."""
    run_promtool("test", "rules", file)
