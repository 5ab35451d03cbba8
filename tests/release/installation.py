"""A wheel installed in a virtual environment, with an empty working folder."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tests.image.container import TIMEOUT_SECONDS, wait_until
from tests.image.host import run_command
from tests.image.report import CheckFailed, expect

_EXCLUDED = "The package `litestar` requires `polyfactory"
"""Fault of an installation from the lock file, since `exclude-dependencies` of pyproject.toml omits this package."""


@dataclass(frozen=True)
class Installation:
    """`environ` is the environment of its commands, which has no reference to the checkout."""

    program: Path
    folder: Path
    environ: Mapping[str, str]

    def check_output(self, *words: str, stdin: str = "", **settings: str) -> str:
        """Run a command that must succeed; returns its output. Raises CheckFailed with it otherwise."""
        code, output = self.execute(*words, stdin=stdin, **settings)
        expect(code == 0, f"{output}`gateway {' '.join(words[:2])}` ended with exit code {code}")
        return output

    def execute(self, *words: str, stdin: str = "", **settings: str) -> tuple[int, str]:
        """Run a command; returns the exit code and all output."""
        done = subprocess.run(
            [self.program, *words],
            cwd=self.folder,
            env={**self.environ, **settings},
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        return done.returncode, done.stdout

    @contextmanager
    def serve(self, ready: str, **settings: str) -> Iterator[None]:
        """Run `gateway serve` from readiness on; it must stop cleanly. Raises CheckFailed."""
        log = self.folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [self.program, "serve"],
                cwd=self.folder,
                env={**self.environ, **settings},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            wait_until(lambda: process.poll() is not None or is_reachable(ready), "readiness")
            expect(process.poll() is None, f"{log.read_text()}it ended with exit code {process.returncode}")
            yield
            process.send_signal(signal.SIGTERM)
            expect(process.wait(TIMEOUT_SECONDS) == 0, f"{log.read_text()}it ended with exit code {process.returncode}")
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"{log.read_text()}it still runs {TIMEOUT_SECONDS:g} s after SIGTERM") from None
        finally:
            process.kill()
            process.wait()


def install(wheel: Path, uv: Path, checkout: Path, folder: Path) -> Installation:
    """Install a wheel without extras, with the packages of the lock file, as in production. Raises CheckFailed."""
    venv, locked, empty = folder / "venv", folder / "locked.txt", folder / "empty"
    command = [str(uv), "--quiet", "--project", str(checkout)]
    run_command([*command, "export", "--locked", "--no-dev", "--no-emit-project", "--output-file", str(locked)])
    run_command([*command, "venv", str(venv)])
    # The lock file has hashes for all packages but the new wheel.
    run_command([*command, "pip", "install", "--python", str(venv), "--no-deps", "--requirements", str(locked)])
    run_command([*command, "pip", "install", "--python", str(venv), "--no-deps", str(wheel)])
    check = subprocess.run(
        [*command, "pip", "check", "--python", str(venv)], capture_output=True, text=True, check=False
    )
    faults = [line for line in check.stderr.splitlines() if line.startswith("The package ")]
    expect([fault.startswith(_EXCLUDED) for fault in faults] == [True], f"{check.stderr}of these, one is expected")
    empty.mkdir()
    return Installation(venv / "bin" / "gateway", empty, {"PATH": os.defpath, "HOME": str(empty)})


def is_reachable(url: str) -> bool:
    """Return whether a URL responds with 200."""
    with suppress(httpx2.TransportError):
        return httpx2.get(url, trust_env=False).status_code == 200
    return False
