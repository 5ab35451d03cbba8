"""The dashboards in the repository are what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from deploy.grafana.__main__ import FOLDER, main, render_all


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all dashboards as they should be."""
    assert CliRunner().invoke(main, ["--folder", str(tmp_path)]).exit_code == 0
    return tmp_path


def test_what_is_there_is_what_would_be_written() -> None:
    """The files in the repository are those that the code writes, to the letter."""
    assert {each.name: each.read_text("utf-8") for each in FOLDER.iterdir()} == render_all()


def test_nothing_to_complain_of(folder: Path) -> None:
    """What was just written passes the check."""
    assert CliRunner().invoke(main, ["--folder", str(folder), "--check"]).exit_code == 0


@pytest.mark.parametrize("how", ["changed", "missing", "unwanted"])
def test_drift_is_named_and_mended(folder: Path, how: str) -> None:
    """A file that is not as it should be fails the check, which names it and the command that mends it."""
    file = folder / ("unwanted.json" if how == "unwanted" else "tasks.json")
    if how == "missing":
        file.unlink()
    else:
        file.write_text("{}\n", "utf-8")
    found = CliRunner().invoke(main, ["--folder", str(folder), "--check"])
    assert found.exit_code == 1
    assert file.name in found.output
    assert "service.json" not in found.output
    assert "python -m deploy.grafana" in found.output
    CliRunner().invoke(main, ["--folder", str(folder)])
    assert {each.name: each.read_text("utf-8") for each in folder.iterdir()} == render_all()
