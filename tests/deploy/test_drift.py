"""The dashboard files are up to date."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from deploy.grafana.__main__ import FOLDER, main, render_all


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with up-to-date dashboards."""
    assert CliRunner().invoke(main, ["--folder", str(tmp_path)]).exit_code == 0
    return tmp_path


def test_repository_is_up_to_date() -> None:
    assert {item.name: item.read_text("utf-8") for item in FOLDER.iterdir()} == render_all()


def test_no_drift(folder: Path) -> None:
    assert CliRunner().invoke(main, ["--folder", str(folder), "--check"]).exit_code == 0


@pytest.mark.parametrize("how", ["changed", "missing", "unwanted"])
def test_drift(folder: Path, how: str) -> None:
    """Changed files fail the check, which names them and the command that fixes them."""
    file = folder / ("unwanted.json" if how == "unwanted" else "tasks.json")
    if how == "missing":
        file.unlink()
    else:
        file.write_text("{}\n", "utf-8")
    result = CliRunner().invoke(main, ["--folder", str(folder), "--check"])
    assert result.exit_code == 1
    assert file.name in result.output
    assert "service.json" not in result.output
    assert "python -m deploy.grafana" in result.output
    CliRunner().invoke(main, ["--folder", str(folder)])
    assert {item.name: item.read_text("utf-8") for item in folder.iterdir()} == render_all()
