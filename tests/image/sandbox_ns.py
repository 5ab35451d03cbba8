"""Namespaces for mounts, network and processes that end with the check."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.image.host import run_command

SECRETS = Path("/run/secrets")
"""The folder of a container's secrets."""
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9)}


def run_in_namespaces(module: str, document: bytes) -> int:
    """Run a module in new namespaces with a document as its standard input; returns the exit code.

    Everything in the namespaces ends with the check, even if it is killed.
    """
    tied = (shutil.which("setpriv") or "setpriv", "--pdeathsig", "KILL")
    isolation = ("unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "--")
    command = [*tied, *isolation, sys.executable, "-m", module]
    return subprocess.run(command, input=document, check=False).returncode


def connect_loopback() -> None:
    """Bring up the loopback interface of a new network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def mount_rootfs(tree: Path, root: Path, secrets: Mapping[str, str], user: int, group: int) -> None:
    """Mount a container's root at `root`, an empty folder.

    That is the read-only tree with devices, secrets and a scratch folder. The mounts exist only in this namespace: the
    folder must not be deleted from within.
    """
    run_command(["mount", "--bind", str(tree), str(root)])
    run_command(["mount", "--options", "remount,bind,ro,nosuid,nodev", str(root)])
    _mount(root / "tmp", "mode=1777,noexec,nosuid,nodev,size=256m")
    _mount(root / "dev", "mode=755,noexec,nosuid,size=64k")
    for name, (major, minor) in _DEVICES.items():
        device = root / "dev" / name
        os.mknod(device, stat.S_IFCHR, os.makedev(major, minor))
        device.chmod(0o666)
    _mount(root / "run", "mode=755,noexec,nosuid,nodev,size=1m")
    folder = root / SECRETS.relative_to("/")
    folder.mkdir()
    for name, secret in secrets.items():
        (folder / name).write_text(secret)
        (folder / name).chmod(0o400)
        os.chown(folder / name, user, group)
    run_command(["mount", "--options", "remount,bind,ro", str(root / "run")])


def _mount(place: Path, options: str) -> None:
    run_command(["mount", "--types", "tmpfs", "--options", options, "tmpfs", str(place)])
