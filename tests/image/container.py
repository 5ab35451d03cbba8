"""Runs an image as an engine would: read-only, with its user, its environment, and its command as process 1."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.image.buildah import Config
from tests.image.report import TIMEOUT_SECONDS, CheckFailed, expect, run_command

SECRETS = Path("/run/secrets")
"""The folder of a container's secrets."""
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9)}


def connect_loopback() -> None:
    """Bring up the loopback interface of a new network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def mount_rootfs(tree: Path, root: Path, secrets: Mapping[str, str], user: int, group: int) -> None:
    """Mount a container's root at `root`, an empty folder: the read-only tree with devices, secrets and scratch folder.

    The mounts exist only in this namespace: the folder must not be deleted from within.
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


@dataclass(frozen=True)
class RunningContainer:
    """A running container."""

    process: subprocess.Popen[bytes]
    log_path: Path

    def read_log(self) -> str:
        return self.log_path.read_text()

    def expect_alive(self) -> None:
        code = self.process.poll()
        expect(code is None, f"{self.read_log()}the container ended with exit code {code}")

    def stop(self, signal_number: signal.Signals) -> int:
        """Send a signal to process 1 of the container; returns the exit code."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(child), signal_number)  # not its parent `unshare`, which does not forward signals
        try:
            return self.process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"{self.read_log()}it still runs {TIMEOUT_SECONDS:g} s after the signal") from None


class Container:
    """An image's configuration on a mounted root."""

    def __init__(self, root: Path, config: Config, settings: Mapping[str, str]) -> None:
        user, group = config.parse_user()
        isolation = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc=/proc")
        place = ("--root", str(root), "--wd", config.working_dir or "/")
        identity = ("--setgid", str(group), "--setuid", str(user))
        self._confined = ["setpriv", "--no-new-privs", *isolation, *place, *identity, "--"]
        self._command = [*config.entrypoint, *config.cmd]
        self._image_environ = dict(item.split("=", 1) for item in config.env)
        self._environ = {**self._image_environ, **settings}

    def execute(self, *words: str, stdin: str = "", without_settings: bool = False) -> tuple[int, str]:
        """Run another command in the container; returns its exit code and its output, stderr included."""
        done = subprocess.run(
            [*self._confined, *words],
            input=stdin,
            env=self._image_environ if without_settings else self._environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=TIMEOUT_SECONDS,
        )
        return done.returncode, done.stdout

    def check_output(self, *words: str, stdin: str = "") -> str:
        """Run another command that must succeed; returns its output."""
        code, output = self.execute(*words, stdin=stdin)
        expect(code == 0, f"{output}`{' '.join(words)}` ended with exit code {code}")
        return output

    @contextmanager
    def start(self, log: Path) -> Iterator[RunningContainer]:
        """Start the image's command, which is killed at the end."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self._confined, *self._command],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            yield RunningContainer(process, log)
        finally:
            process.kill()
            process.wait()
