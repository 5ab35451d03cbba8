"""The reference of settings is up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from deploy.reference import ROOT, find_drift, main
from service.settings import SETTINGS


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a copy of the repository with up-to-date files."""
    (tmp_path / "deploy").mkdir()
    for name in ("README.md", "deploy/SETTINGS.md"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


def run_command(root: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["--root", str(root), *words])


def test_repository_is_up_to_date() -> None:
    assert find_drift(ROOT) == []


def test_every_setting_has_an_entry() -> None:
    """All settings are documented, in the order of the code."""
    text = (ROOT / "deploy" / "SETTINGS.md").read_text("utf-8")
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == [setting.name for setting in SETTINGS]
    assert all(setting.description in text and setting.expected_format in text for setting in SETTINGS)
    assert text.count("- a secret") == sum(setting.is_secret for setting in SETTINGS)


def test_readme_has_required_settings() -> None:
    """The README lists every setting that production requires."""
    rows = re.findall(r"^\| `(GATEWAY_\w+)` \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert {"GATEWAY_ENV", "GATEWAY_REDIS_URL", "GATEWAY_UPSTREAM_URL", "GATEWAY_SECRET_KEYS"} < set(rows)


@pytest.mark.parametrize("name", ["README.md", "deploy/SETTINGS.md"])
def test_drift(repository: Path, name: str) -> None:
    """A file with another default fails the check, which names it alone, and writing fixes it."""
    file, right = repository / name, (repository / name).read_text("utf-8")
    assert run_command(repository, "--check").exit_code == 0
    file.write_text(right.replace("`8081`", "`8084`"), "utf-8")
    result = run_command(repository, "--check")
    assert result.exit_code == 1
    assert result.output == f"Error: not up to date: {name}; `make settings` rewrites them\n"
    assert run_command(repository).exit_code == 0
    assert file.read_text("utf-8") == right


def test_missing_reference(repository: Path) -> None:
    file = repository / "deploy" / "SETTINGS.md"
    file.unlink()
    assert run_command(repository, "--check").exit_code == 1
    assert run_command(repository).exit_code == 0
    assert file.exists()


def test_readme_markers(repository: Path) -> None:
    """Only the part of the README between the markers is rewritten; without markers nothing is."""
    file = repository / "README.md"
    text = file.read_text("utf-8")
    file.write_text(f"Before.\n{text.replace('`8080`', '`80`')}After.\n", "utf-8")
    run_command(repository)
    assert file.read_text("utf-8") == f"Before.\n{text}After.\n"
    file.write_text("No markers.\n", "utf-8")
    result = run_command(repository)
    assert result.exit_code == 1
    assert "README.md must have the lines <!-- settings" in result.output
    assert file.read_text("utf-8") == "No markers.\n"
