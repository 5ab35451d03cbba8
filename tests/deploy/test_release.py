"""What a wheel is refused for; `make release-check` builds one and tries it."""

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
    """A checkout with a package of two files, and what is no part of it."""
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


def test_a_good_wheel(checkout: Path, wheel: Path) -> None:
    """A wheel with the whole package and its description passes."""
    write_wheel(wheel, GOOD_FILES)
    assert expect_complete(wheel, checkout) == len(GOOD_FILES)
    expect_metadata(wheel, "1.2.3", README)


def test_a_script_is_missing(checkout: Path, wheel: Path) -> None:
    """A wheel without a file of the package fails, by its name: it would serve, until that is needed."""
    write_wheel(wheel, {name: text for name, text in GOOD_FILES.items() if not name.endswith(".lua")})
    with expect_failure("the wheel lacks service/storage/lua/settle.lua"):
        expect_complete(wheel, checkout)


@pytest.mark.parametrize("name", ["tests/test_app.py", "deploy/compose.yaml", "service/__pycache__/app.pyc", "secret"])
def test_what_does_not_belong(checkout: Path, wheel: Path, name: str) -> None:
    """A wheel with anything else fails, by its name."""
    write_wheel(wheel, {**GOOD_FILES, name: ""})
    with expect_failure(f"no part of the package: {name}"):
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
def test_a_wrong_description(wheel: Path, was: str, is_: str, words: str) -> None:
    """A wheel that says something else of itself than the checkout fails."""
    write_wheel(wheel, {**GOOD_FILES, f"{DIST_INFO}/METADATA": METADATA.replace(was, is_)})
    with expect_failure(words):
        expect_metadata(wheel, "1.2.3", README)


def test_no_command(wheel: Path) -> None:
    """A wheel that brings no command `gateway` fails."""
    write_wheel(wheel, {**GOOD_FILES, f"{DIST_INFO}/entry_points.txt": ""})
    with expect_failure("no command `gateway`"):
        expect_metadata(wheel, "1.2.3", README)


def test_the_version_is_said_once() -> None:
    """The package's version is read from the code, which has one that can be compared."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"] == {"path": "service/__init__.py"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_the_changelog_is_in_order() -> None:
    """The changelog begins with what is not released, then has each version once, the newest first, with its day."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    unreleased, *released = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert unreleased == "[Unreleased]"
    found = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d\d-\d\d", each) for each in released]
    versions = [tuple(map(int, each.groups())) for each in found if each]
    assert len(versions) == len(released)
    assert versions == sorted(set(versions), reverse=True)
    assert released[0].startswith(f"[{__version__}] ")
