"""One line per check, like the Makefile's other steps, and commands that must succeed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

TIMEOUT_SECONDS = 30.0


class CheckFailed(Exception):
    """A check has failed; the message is for people."""


def expect(condition: object, message: str) -> None:
    """Raise CheckFailed unless the condition holds."""
    if not condition:
        raise CheckFailed(message)


@contextmanager
def step(name: str) -> Iterator[list[str]]:
    """Run a check and print its line at the end, with the figures appended to the list; CheckFailed exits with 1."""
    figures: list[str] = []
    try:
        yield figures
    except CheckFailed as fault:
        click.echo(f"{fault}\nFAILED  {name}")
        sys.exit(1)
    click.echo(": ".join([f"ok      {name}", *filter(None, [", ".join(figures)])]))


def run_command(command: Sequence[str]) -> str:
    """Run a command; returns its output. Raises CheckFailed with all output if it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"{done.stdout}{done.stderr}`{command[0]}` ended with exit code {done.returncode}")
    return done.stdout


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition. Raises CheckFailed on timeout."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        expect(time.monotonic() < deadline, f"{what} was not reached within {TIMEOUT_SECONDS:g} s")
        time.sleep(0.02)
