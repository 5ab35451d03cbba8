"""Prints one line per check, like the Makefile's other steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

_MIN_SHOWN_SECONDS = 1.0


class CheckFailed(Exception):
    """A check has failed; the message is for people."""


def expect(condition: object, message: str) -> None:
    """Raise CheckFailed unless the condition holds."""
    if not condition:
        raise CheckFailed(message)


@contextmanager
def step(name: str) -> Iterator[list[str]]:
    """Run a check and print its line at the end, with the figures appended to the list.

    CheckFailed is printed and exits with 1.
    """
    figures: list[str] = []
    started_at = time.monotonic()
    try:
        yield figures
    except CheckFailed as fault:
        click.echo(f"{fault}\nFAILED  {name}")
        sys.exit(1)
    took = time.monotonic() - started_at
    if took >= _MIN_SHOWN_SECONDS:
        figures.append(f"{took:.0f} s")
    click.echo(f"ok      {name}: {', '.join(figures)}" if figures else f"ok      {name}")
