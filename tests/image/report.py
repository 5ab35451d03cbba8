"""One line per check, as the Makefile's other steps print them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

_MIN_SHOWN_SECONDS = 1.0


class CheckFailed(Exception):
    """A check has failed; the message says to a person what was found."""


def expect(condition: object, message: str) -> None:
    """Raise Fault unless the condition holds."""
    if not condition:
        raise CheckFailed(message)


@contextmanager
def step(name: str) -> Iterator[list[str]]:
    """A check: its line is printed at its end, with the figures that were put into the list.

    A Fault is printed and ends the program with exit code 1.
    """
    figures: list[str] = []
    began = time.monotonic()
    try:
        yield figures
    except CheckFailed as fault:
        click.echo(f"{fault}\nFAILED  {name}")
        sys.exit(1)
    took = time.monotonic() - began
    if took >= _MIN_SHOWN_SECONDS:
        figures.append(f"{took:.0f} s")
    click.echo(f"ok      {name}: {', '.join(figures)}" if figures else f"ok      {name}")
