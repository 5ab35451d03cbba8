"""Requirements of the host."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from tests.image.report import CheckFailed, expect

_PACKAGES = {
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "mount": "mount",
    "setpriv": "util-linux",
    "unshare": "util-linux",
}
_TARGET = "$(ORIGIN)\t$(CODENAME)\t$(COMPONENT)\t$(REPO_URI)"


@dataclass(frozen=True)
class Debian:
    """The host's Debian release and mirror."""

    suite: str
    mirror: str


def run_command(command: Sequence[str]) -> str:
    """Run a command; returns its output. Raises CheckFailed with all output if it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckFailed(f"{done.stdout}{done.stderr}`{command[0]}` ended with exit code {done.returncode}")
    return done.stdout


def require_tools() -> None:
    """Raise CheckFailed if the check cannot run here."""
    expect(os.geteuid() == 0, "this check makes a base image, namespaces and mounts: run it as root")
    missing = sorted({package for tool, package in _PACKAGES.items() if not shutil.which(tool)})
    expected = " ".join(missing)
    expect(not missing, f"tools are missing: apt-get install --no-install-recommends --yes {expected}")


def detect_debian() -> Debian:
    """Detect the release from apt. Raises CheckFailed if it is no Debian, or apt has no package lists."""
    expect(shutil.which("apt-get"), "this check needs Debian: there is no apt-get")
    for line in run_command(["apt-get", "indextargets", "--format", _TARGET, "Identifier: Packages"]).splitlines():
        origin, suite, component, mirror = line.split("\t")
        if (origin, component) == ("Debian", "main") and "-" not in suite:
            return Debian(suite, mirror)
    raise CheckFailed("apt knows of no Debian release: run apt-get update")
