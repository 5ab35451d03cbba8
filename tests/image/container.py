"""An image's tree and configuration, run as an engine would: its user, its environment, its command as process 1."""

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
from tests.image.report import Fault, expect

SECONDS = 30.0
_LOOK_SECONDS = 0.02


def until(condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    """Wait for a condition. Raises Fault if it does not come about."""
    deadline = time.monotonic() + seconds
    while not condition():
        expect(time.monotonic() < deadline, f"{what} did not come about within {seconds:g} s")
        time.sleep(_LOOK_SECONDS)


def numbers(user: str) -> tuple[int, int]:
    """An image's user and group. Raises Fault if they are root's, or names, which Kubernetes can't judge."""
    uid, _, gid = user.partition(":")
    expect(uid.isdecimal() and gid.isdecimal(), f"the image's user must be two numbers, not {user!r}")
    expect(int(uid) and int(gid), f"the image's user must not be root: {user}")
    return int(uid), int(gid)


@dataclass(frozen=True)
class Running:
    """A container's command under way."""

    process: subprocess.Popen[bytes]
    log: Path

    def expect_alive(self) -> None:
        """Raise Fault with its log if it has ended."""
        if self.process.poll() is not None:
            raise Fault(f"{self.log.read_text()}the container ended with exit code {self.process.returncode}")

    def stop(self, number: signal.Signals) -> int:
        """Send a signal to process 1 of the container, and wait for its end; the exit code."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(child), number)  # not `unshare`, whose child it is, and which would not pass it on
        try:
            return self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise Fault(f"{self.log.read_text()}it still runs {SECONDS:g} s after the signal") from None


class Container:
    """What an image's configuration makes of a furnished root."""

    def __init__(self, root: Path, config: Config, settings: Mapping[str, str]) -> None:
        self._root = root
        self._config = config
        self._user, self._group = numbers(config.user)
        self._bare = dict(each.split("=", 1) for each in config.env)
        self._environ = {**self._bare, **settings}

    def execute(self, *words: str, given: str = "", bare: bool = False) -> tuple[int, str]:
        """Run another command in the container, bare of all settings or with them.

        Returns its exit code, and what it printed of either kind.
        """
        try:
            done = subprocess.run(
                [*self._confined(), *words],
                input=given,
                env=self._bare if bare else self._environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise Fault(f"`{' '.join(words)}` did not end within {SECONDS:g} s") from None
        return done.returncode, done.stdout

    def succeed(self, *words: str, given: str = "") -> str:
        """Run another command in the container that has to succeed; what it printed."""
        code, said = self.execute(*words, given=given)
        expect(code == 0, f"{said}`{' '.join(words)}` ended with exit code {code}")
        return said

    @contextmanager
    def running(self, log: Path) -> Iterator[Running]:
        """Start the image's own command, which is killed at the end if it has not ended."""
        command = [*self._confined(), *self._config.entrypoint, *self._config.cmd]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=self._environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            yield Running(process, log)
        finally:
            process.kill()
            process.wait()

    def _confined(self) -> list[str]:
        setpriv, unshare = shutil.which("setpriv") or "setpriv", shutil.which("unshare") or "unshare"
        namespaces = ("--pid", "--fork", "--kill-child", "--mount-proc=/proc")
        place = ("--root", str(self._root), "--wd", self._config.working_dir or "/")
        identity = ("--setgid", str(self._group), "--setuid", str(self._user))
        return [setpriv, "--no-new-privs", unshare, *namespaces, *place, *identity, "--"]
