"""The first half of the check: build the image, check it from outside, then run the smoke test in namespaces."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from msgspec import json

from service import __version__
from tests.image import rootfs_check
from tests.image.buildah import Config, ImageStore
from tests.image.container import parse_user
from tests.image.host import detect_debian, require_tools, run_command
from tests.image.report import expect, step
from tests.image.sandbox_ns import run_in_namespaces
from tests.image.smoke_test import SmokeTestInput

_ROOT = Path(__file__).parents[2]
_STORE = _ROOT / ".tools" / "image"
_LABEL = "org.opencontainers.image."
_PORTS = {"8080/tcp", "8081/tcp"}
_MEGABYTE = 1_000_000


def main() -> int:
    """Build and check the image; returns the exit code."""
    with step("image: requirements"):
        require_tools()
        release = detect_debian()
    with _open_store() as store:
        with step("image: base") as figures:
            base = store.build_base(release)
            figures.append(release.suite)
        with step("image: build"):
            labels = _labels(base)
            arguments = {"VERSION": labels["version"], "REVISION": labels["revision"], "CREATED": labels["created"]}
            image = store.build(_ROOT, {"PYTHON_IMAGE": base, **arguments})
        with step("image: configuration"):
            config = store.read_config(image)
            _expect_configuration(config, labels)
        with step("image: files") as figures:
            root = store.mount(image)
            figures.append(_expect_files(config, store.mount(base), root))
        with TemporaryDirectory(prefix="image-check-") as folder:
            return run_in_namespaces("tests.image.smoke_test", json.encode(SmokeTestInput(config, str(root), folder)))


@contextmanager
def _open_store() -> Iterator[ImageStore]:
    store = ImageStore(_STORE)
    store.clean_up()
    try:
        yield store
    finally:
        store.clean_up()


def _labels(base: str) -> dict[str, str]:
    return {
        "version": __version__,
        "revision": run_command(["git", "-C", str(_ROOT), "rev-parse", "HEAD"]).strip(),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "base.name": base,
    }


def _expect_configuration(config: Config, labels: dict[str, str]) -> None:
    parse_user(config.user)
    expect(config.entrypoint == ["gateway"], f"the entry point is {config.entrypoint}")
    expect(config.cmd == ["serve"], f"the command is {config.cmd}")
    expect(config.exposed_ports.keys() == _PORTS, f"the ports are {sorted(config.exposed_ports)}")
    expect(config.stop_signal == "SIGTERM", f"the signal to stop is {config.stop_signal!r}")
    expect("GATEWAY_ENV=production" in config.env, "the environment is not production")
    for name, value in labels.items():
        result = config.labels.get(_LABEL + name)
        expect(result == value, f"the label {_LABEL}{name} is {result!r}, not {value!r}")
    for name in ("title", "description", "source"):
        expect(config.labels.get(_LABEL + name), f"the label {_LABEL}{name} is missing")


def _expect_files(config: Config, base: Path, root: Path) -> str:
    """Check the files; returns a summary of their size."""
    before, after = rootfs_check.scan_tree(base), rootfs_check.scan_tree(root)
    rootfs_check.expect_only_app_added(before, after)
    rootfs_check.expect_nothing_writable(after, *parse_user(config.user))
    rootfs_check.expect_production_only(root)
    complete, app = (
        rootfs_check.total_size(after, folder) // _MEGABYTE for folder in (PurePosixPath(), rootfs_check.APP)
    )
    return f"{complete} MB, {app} MB without its base"


if __name__ == "__main__":
    sys.exit(main())
