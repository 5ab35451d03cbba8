"""Rules of the repository."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]


def list_files(folder: Path = ROOT) -> list[Path]:
    """Return the files that git does not ignore."""
    ignored = [".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split())]
    paths = [path for path in folder.iterdir() if not any(fnmatch(path.name, pattern) for pattern in ignored)]
    return [file for path in paths for file in (list_files(path) if path.is_dir() else [path])]


def test_no_machine_paths() -> None:
    folders = re.compile(rb"(?<![\w.*-])/(root|work|home/\w+)/")
    texts = {str(path.relative_to(ROOT)): path.read_bytes() for path in list_files()}
    assert [name for name, text in texts.items() if b"\0" not in text and folders.search(text)] == []
