"""Each script is sent with the shared parts and constants that it uses, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.storage import redis
from service.storage.redis import SCRIPT_NAMES

FOLDER = Path(redis.__file__).with_name("lua")
PARTS = {path.stem: path.read_text() for path in (FOLDER / "shared").glob("*.lua")}
DEFINED = {part: set(re.findall(r"^local function (\w+)", text, re.MULTILINE)) for part, text in PARTS.items()}
FILES = [*FOLDER.glob("*.lua"), *(FOLDER / "shared").glob("*.lua")]


def strip_comments(text: str) -> str:
    return re.sub(r"--.*", "", text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_uses(path: Path) -> None:
    """A file names the parts whose functions it calls itself."""
    text = path.read_text()
    called = set(re.findall(r"(?<![.:\w])(\w+)\(", strip_comments(text)))
    uses = re.search(r"^-- USES: (.+)$", text, re.MULTILINE)
    assert set(uses[1].split(", ") if uses else ()) == {
        part for part, names in DEFINED.items() if part != path.stem and names & called
    }


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_assembled_script(name: str) -> None:
    """Functions and constants are defined once, before they are used."""
    text = strip_comments(redis._assemble(name, has_version=True))
    defined = re.findall(r"^local (?:function )?(\w+)", text, re.MULTILINE)
    for part, names in DEFINED.items():
        if any(function in defined for function in names):
            assert names <= set(defined), part
            assert all(defined.count(function) == 1 for function in names), part
    constants = set(re.findall(r"(?<!')\b[A-Z]+(?:_[A-Z]+)+\b", text)) | ({"WINDOWS"} & set(text.split()))
    assert constants <= set(defined)
    for constant in constants:
        assert text.index(constant) == text.index(f"local {constant} = ") + len("local ")
