from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from service import __version__

ROOT = Path(__file__).parents[2]


def list_files(folder: Path = ROOT) -> Iterator[Path]:
    """Iterate over the files that git does not ignore."""
    ignored = [".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split())]
    for path in sorted(folder.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in ignored):
            continue
        if path.is_dir():
            yield from list_files(path)
        else:
            yield path


def public_names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def iter_nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def test_no_machine_paths() -> None:
    folders = re.compile(rb"(?<![\w.*-])/(root|work|home/\w+)/")
    texts = {public_names(path): path.read_bytes() for path in list_files()}
    assert [name for name, text in texts.items() if b"\0" not in text and folders.search(text)] == []


def test_every_test_runs() -> None:
    excuses = {"skip", "skipif", "xfail", "importorskip"}
    places = [
        f"{public_names(path)}:{node.lineno}"
        for path in list_files(ROOT / "tests")
        if path.suffix == ".py"
        for node in iter_nodes(path)
        if isinstance(node, ast.Attribute) and node.attr in excuses
    ]
    assert places == []


def test_environment_is_read_in_one_place() -> None:
    readers = {
        public_names(path)
        for path in list_files(ROOT / "service")
        if path.suffix == ".py"
        for node in iter_nodes(path)
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
        if isinstance(node.value, ast.Name) and node.value.id == "os"
    }
    assert readers == {"service/cli/common.py"}


def test_changelog_has_the_version() -> None:
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
