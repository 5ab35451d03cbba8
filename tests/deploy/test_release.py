"""The checks of a wheel; `make release-check` builds one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import pytest

from service import __version__
from tests.image.report import CheckFailed
from tests.release.wheel import expect_complete, expect_metadata

ROOT = Path(__file__).parents[2]
README = "# A gateway\n\nWith a second line.\n"
DIST_INFO = "imaging_gateway-1.2.3.dist-info"
METADATA = f"""\
Metadata-Version: 2.4
Name: imaging-gateway
Version: 1.2.3
Summary: A gateway.
Description-Content-Type: text/markdown

{README}"""
GOOD_FILES = {
    "service/app.py": "",
    "service/storage/lua/settle.lua": "",
    f"{DIST_INFO}/METADATA": METADATA,
    f"{DIST_INFO}/entry_points.txt": "[console_scripts]\ngateway = service.cli:main\n",
    f"{DIST_INFO}/RECORD": "",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout with a package of two files, and others beside it."""
    for name in (
        "service/app.py",
        "service/storage/lua/settle.lua",
        "service/__pycache__/app.pyc",
        "tests/test_app.py",
    ):
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "checkout"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return tmp_path / "imaging_gateway-1.2.3-py3-none-any.whl"


def write_wheel(wheel: Path, files: Mapping[str, str]) -> Path:
    with ZipFile(wheel, "w") as opened:
        for name, text in files.items():
            opened.writestr(name, text)
    return wheel


@contextmanager
def expect_failure(words: str) -> Iterator[None]:
    with pytest.raises(CheckFailed, match=re.escape(words)):
        yield


def test_valid_wheel(checkout: Path, wheel: Path) -> None:
    write_wheel(wheel, GOOD_FILES)
    assert expect_complete(wheel, checkout) == len(GOOD_FILES)
    expect_metadata(wheel, "1.2.3", README)


def test_missing_file(checkout: Path, wheel: Path) -> None:
    write_wheel(wheel, {name: text for name, text in GOOD_FILES.items() if not name.endswith(".lua")})
    with expect_failure("the wheel lacks service/storage/lua/settle.lua"):
        expect_complete(wheel, checkout)


@pytest.mark.parametrize("name", ["tests/test_app.py", "deploy/compose.yaml", "service/__pycache__/app.pyc", "secret"])
def test_superfluous_file(checkout: Path, wheel: Path, name: str) -> None:
    write_wheel(wheel, {**GOOD_FILES, name: ""})
    with expect_failure(f"outside the package: {name}"):
        expect_complete(wheel, checkout)


@pytest.mark.parametrize(
    ("was", "is_", "words"),
    [
        ("Version: 1.2.3", "Version: 1.2.4", "Version is '1.2.4', not '1.2.3'"),
        ("Name: imaging-gateway", "Name: gateway", "Name is 'gateway'"),
        ("Summary: A gateway.\n", "", "no summary"),
        ("text/markdown", "text/plain", "Description-Content-Type is 'text/plain'"),
        ("a second line", "another line", "is not the README"),
    ],
)
def test_wrong_metadata(wheel: Path, was: str, is_: str, words: str) -> None:
    write_wheel(wheel, {**GOOD_FILES, f"{DIST_INFO}/METADATA": METADATA.replace(was, is_)})
    with expect_failure(words):
        expect_metadata(wheel, "1.2.3", README)


def test_missing_command(wheel: Path) -> None:
    write_wheel(wheel, {**GOOD_FILES, f"{DIST_INFO}/entry_points.txt": ""})
    with expect_failure("no command `gateway`"):
        expect_metadata(wheel, "1.2.3", README)


def test_version() -> None:
    """The version is taken from the code, and has three numbers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"] == {"path": "service/__init__.py"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_changelog_order() -> None:
    """The changelog has an optional unreleased part, then each version once, newest first, with its date."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    released = headings[1:] if headings[0] == "[Unreleased]" else headings
    matches = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d\d-\d\d", heading) for heading in released]
    versions = [tuple(map(int, match.groups())) for match in matches if match]
    assert len(versions) == len(released)
    assert versions == sorted(set(versions), reverse=True)
    assert released[0].startswith(f"[{__version__}] ")
