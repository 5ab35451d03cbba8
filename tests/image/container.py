"""Runs an image as an engine would: with its user, its environment, and its command as process 1."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.image.buildah import Config
from tests.image.report import CheckFailed, expect

TIMEOUT_SECONDS = 30.0
_POLL_SECONDS = 0.02


def wait_until(condition: Callable[[], bool], what: str, seconds: float = TIMEOUT_SECONDS) -> None:
    """Wait for a condition. Raises CheckFailed on timeout."""
    deadline = time.monotonic() + seconds
    while not condition():
        expect(time.monotonic() < deadline, f"{what} was not reached within {seconds:g} s")
        time.sleep(_POLL_SECONDS)


def parse_user(user: str) -> tuple[int, int]:
    """Return an image's user and group ids. Raises CheckFailed for root and for names."""
    uid, _, gid = user.partition(":")
    expect(uid.isdecimal() and gid.isdecimal(), f"the image's user must be two numbers, not {user!r}")
    expect(int(uid) and int(gid), f"the image's user must not be root: {user}")
    return int(uid), int(gid)


@dataclass(frozen=True)
class RunningContainer:
    """A running container."""

    process: subprocess.Popen[bytes]
    log: Path

    def expect_alive(self) -> None:
        """Raise CheckFailed with its log if it has exited."""
        if self.process.poll() is not None:
            raise CheckFailed(f"{self.log.read_text()}the container ended with exit code {self.process.returncode}")

    def stop(self, signal_number: signal.Signals) -> int:
        """Send a signal to process 1 of the container; returns the exit code."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(child), signal_number)  # not its parent `unshare`, which does not forward signals
        try:
            return self.process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"{self.log.read_text()}it still runs {TIMEOUT_SECONDS:g} s after the signal") from None


class Container:
    """An image's configuration on a mounted root."""

    def __init__(self, root: Path, config: Config, settings: Mapping[str, str]) -> None:
        self._root = root
        self._config = config
        self._user, self._group = parse_user(config.user)
        self._image_environ = dict(item.split("=", 1) for item in config.env)
        self._environ = {**self._image_environ, **settings}

    def execute(self, *words: str, stdin: str = "", without_settings: bool = False) -> tuple[int, str]:
        """Run another command in the container, with or without the settings.

        Returns its exit code and its output, stderr included.
        """
        try:
            done = subprocess.run(
                [*self._confined_command(), *words],
                input=stdin,
                env=self._image_environ if without_settings else self._environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"`{' '.join(words)}` did not end within {TIMEOUT_SECONDS:g} s") from None
        return done.returncode, done.stdout

    def check_output(self, *words: str, stdin: str = "") -> str:
        """Run another command that must succeed; returns its output."""
        code, output = self.execute(*words, stdin=stdin)
        expect(code == 0, f"{output}`{' '.join(words)}` ended with exit code {code}")
        return output

    @contextmanager
    def start(self, log: Path) -> Iterator[RunningContainer]:
        """Start the image's command, which is killed at the end."""
        command = [*self._confined_command(), *self._config.entrypoint, *self._config.cmd]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=self._environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            yield RunningContainer(process, log)
        finally:
            process.kill()
            process.wait()

    def _confined_command(self) -> list[str]:
        setpriv, unshare = shutil.which("setpriv") or "setpriv", shutil.which("unshare") or "unshare"
        namespaces = ("--pid", "--fork", "--kill-child", "--mount-proc=/proc")
        place = ("--root", str(self._root), "--wd", self._config.working_dir or "/")
        identity = ("--setgid", str(self._group), "--setuid", str(self._user))
        return [setpriv, "--no-new-privs", unshare, *namespaces, *place, *identity, "--"]
