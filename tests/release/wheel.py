"""Files and metadata of a wheel."""

from __future__ import annotations

from email import message_from_string
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

from tests.image.report import expect

_PACKAGE = "service"


def expect_complete(wheel: Path, checkout: Path) -> int:
    """Require exactly the files of the package; returns their number. Raises CheckFailed."""
    with ZipFile(wheel) as opened:
        held = {PurePosixPath(name) for name in opened.namelist()}
    expected = {
        PurePosixPath(path.relative_to(checkout))
        for path in (checkout / _PACKAGE).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    strange = sorted(map(str, {path for path in held - expected if not path.parts[0].endswith(".dist-info")}))
    missing = sorted(map(str, expected - held))
    expect(not strange, f"the wheel has files outside the package: {', '.join(strange)}")
    expect(not missing, f"the wheel lacks {', '.join(missing)}")
    return len(held)


def expect_metadata(wheel: Path, version: str, readme: str) -> None:
    """Require name, version, README and command. Raises CheckFailed."""
    with ZipFile(wheel) as opened:
        names = {PurePosixPath(name).name: name for name in opened.namelist() if ".dist-info/" in name}
        result = message_from_string(opened.read(names["METADATA"]).decode())
        commands = opened.read(names["entry_points.txt"]).decode().split()
    for field, expected in (
        ("Name", "imaging-gateway"),
        ("Version", version),
        ("Description-Content-Type", "text/markdown"),
    ):
        expect(result[field] == expected, f"the wheel's {field} is {result[field]!r}, not {expected!r}")
    expect(result["Summary"], "the wheel has no summary")
    expect(str(result.get_payload()).strip() == readme.strip(), "the wheel's description is not the README")
    expect("gateway" in commands, "the wheel has no command `gateway`")
