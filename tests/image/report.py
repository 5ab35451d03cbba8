"""One line per check, like the Makefile's other steps, and the programs that are checked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import click
import httpx2
from msgspec import json

from service.demo.run import JOBS
from service.devstack import SANDBOX_USER_KEY
from tests.process.gateway import TIMEOUT_SECONDS, wait_until


@contextmanager
def step(name: str) -> Iterator[None]:
    """Run a check and print its line at the end; a failed assertion exits with 1."""
    try:
        yield
    except AssertionError as fault:
        click.echo(f"{fault}\nFAILED  {name}")
        sys.exit(1)
    click.echo(f"ok      {name}")


def run_command(command: Sequence[str]) -> str:
    """Run a command; returns its output. It must succeed."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}`{command[0]}` ended with exit code {done.returncode}"
    return done.stdout


def is_ready(url: str) -> bool:
    with suppress(httpx2.TransportError):
        return httpx2.get(f"{url}/readyz", trust_env=False).status_code == 200
    return False


@dataclass(frozen=True)
class Program:
    """How to run commands: the words before each, their whole environment and their folder."""

    words: Sequence[str]
    environ: Mapping[str, str]
    folder: Path

    def execute(self, *words: str, stdin: str = "") -> tuple[int, str]:
        """Run a command; returns the exit code and all output."""
        done = subprocess.run(
            [*self.words, *words],
            cwd=self.folder,
            env=self.environ,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        return done.returncode, done.stdout

    def check_output(self, *words: str, stdin: str = "") -> str:
        """Run a command that must succeed; returns its output."""
        code, output = self.execute(*words, stdin=stdin)
        assert code == 0, f"{output}`{' '.join(words[:3])}` ended with exit code {code}"
        return output

    def expect_failure(self, *words: str, code: int, names: Sequence[str]) -> None:
        """Require that a command fails with this exit code and an error that has these names."""
        result, output = self.execute(*words)
        assert result == code, f"{output}`{' '.join(words)}` ended with {result}"
        assert "Traceback" not in output, output
        assert all(name in output for name in names), f"{output}`{' '.join(words)}` does not name {names}"

    @contextmanager
    def start(self, *words: str, log: Path, ops_url: str) -> Iterator[subprocess.Popen[bytes]]:
        """Start a gateway, which is killed at the end, and wait until it is ready."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self.words, *words],
                cwd=self.folder,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            wait_until(lambda: process.poll() is not None or is_ready(ops_url), "readiness")
            assert process.poll() is None, f"{log.read_text()}it ended with exit code {process.returncode}"
            yield process
        finally:
            process.kill()
            process.wait()


def run_main_job(gateway: Program, url: str, results: Path) -> str:
    """Create an account, a tenant and a token with a `gateway`, run the checkout's demo with them, return the token.

    The demo checks the images with a library that production does not have.
    """
    gateway.check_output("account", "create", "main", "--user-key-file", "-", stdin=SANDBOX_USER_KEY)
    gateway.check_output("tenant", "create", "shop", "--account", "main", "--limit", f"total:tasks={len(JOBS)}")
    token = json.decode(gateway.check_output("token", "create", "shop", "--json"))["token"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    demo = Program([sys.executable, "-m", "service", "demo"], own, Path.cwd())
    demo.check_output("--url", url, "--token", token, "--folder", str(results))
    policies = json.decode(gateway.check_output("quota", "shop", "--json"))["policies"]
    left = [policy["remaining"] for policy in policies if policy["unit"] == "tasks"]
    assert left == [0], f"of a limit of {len(JOBS)} tasks, {left} are left"
    return str(token)
