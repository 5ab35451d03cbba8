"""Runs buildah with a store of its own.

The driver vfs and the isolation chroot are slower than others, but also work in a container.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, convert, field, json

from tests.image.report import run_command

_PYTHON = "python3,python3-venv,ca-certificates"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_IMAGE = "localhost/imaging-gateway:check"
_TARGET = "$(ORIGIN)\t$(CODENAME)\t$(COMPONENT)\t$(REPO_URI)"


class Config(Struct, rename="pascal"):
    """The configuration that running an image needs. Commands in shell form would start with a shell."""

    user: str = ""
    env: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)
    working_dir: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    exposed_ports: dict[str, dict[str, str]] = field(default_factory=dict)
    stop_signal: str = ""
    healthcheck: dict[str, Any] = field(default_factory=dict)

    def parse_user(self) -> tuple[int, int]:
        """Return user and group ids. It must not be root, and no names."""
        ids = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", self.user)
        assert ids, f"the image's user must be two numbers and not root, not {self.user!r}"
        return int(ids[1]), int(ids[2])


def detect_debian() -> tuple[str, str]:
    """Return suite and mirror of the host's Debian, which must have all tools."""
    assert os.geteuid() == 0, "this check makes a base image, namespaces and mounts: run it as root"
    missing = [tool for tool in ("apt-get", "buildah", "debootstrap", "setpriv", "unshare") if not shutil.which(tool)]
    assert not missing, f"this check needs Debian with {', '.join(missing)}"
    for line in run_command(["apt-get", "indextargets", "--format", _TARGET, "Identifier: Packages"]).splitlines():
        origin, suite, component, mirror = line.split("\t")
        if (origin, component) == ("Debian", "main") and "-" not in suite:
            return suite, mirror
    raise AssertionError("apt knows of no Debian release: run apt-get update")


class ImageStore:
    """A store of images in a folder."""

    def __init__(self, folder: Path) -> None:
        storage = ("--root", str(folder / "storage"), "--runroot", str(folder / "run"), "--storage-driver", "vfs")
        self._buildah = ("buildah", *storage)

    def clean_up(self) -> None:
        """Delete what a previous run has left, except for the base image."""
        self._run("rm", "--all")
        if self._has_image(_IMAGE):
            self._run("rmi", "--force", _IMAGE)
        self._run("rmi", "--prune")

    def build_base(self, suite: str, mirror: str) -> str:
        """Build the base image once, which takes a minute; returns its name."""
        name = f"localhost/python:{suite}"
        if not self._has_image(name):
            container = self._run("from", "scratch")
            root = self._run("mount", container)
            run_command(["debootstrap", "--variant=minbase", f"--include={_PYTHON}", suite, root, mirror])
            run_command(["rm", "--recursive", "--force", f"{root}/var/cache/apt", f"{root}/var/lib/apt/lists"])
            self._run("config", "--env", f"PATH={_PATH}", container)
            self._run("commit", "--quiet", "--rm", container, name)
        return name

    def build(self, context: Path, arguments: Mapping[str, str]) -> str:
        """Build the Dockerfile of a folder; returns the image's name."""
        words = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        if _CERTIFICATES.exists():
            words += ["--secret", f"id=certificates,src={_CERTIFICATES}"]
        # Docker's format, since OCI's has no health check.
        options = ("--isolation", "chroot", "--format", "docker", "--pull-never", "--tag", _IMAGE)
        self._run("build", *options, *words, str(context))
        return _IMAGE

    def read_config(self, image: str) -> Config:
        inspected: Any = json.decode(self._run("inspect", "--type", "image", image))
        return convert(inspected["Docker"]["config"], Config)

    def mount(self, image: str) -> Path:
        """Mount an image's files; returns the folder, which exists until `clean_up`."""
        return Path(self._run("mount", self._run("from", "--pull-never", image)))

    def _has_image(self, image: str) -> bool:
        return bool(self._run("images", "--quiet", "--filter", f"reference={image}"))

    def _run(self, *words: str) -> str:
        return run_command([*self._buildah, *words]).strip()
