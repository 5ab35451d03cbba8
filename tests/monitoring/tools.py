"""Where Prometheus' own programs are, which are no packages of Python."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def find_promtool() -> Path:
    """What checks configuration and rules. Raises FileNotFoundError that says how to install it."""
    return _find_program("promtool")


def find_prometheus() -> Path:
    """The server. Raises FileNotFoundError that says how to install it."""
    return _find_program("prometheus")


def _find_program(name: str) -> Path:
    """A program, at the place that the variable of its name in capitals says, else on the path."""
    found = shutil.which(os.environ.get(name.upper(), name))
    if found is None:
        raise FileNotFoundError(f"there is no {name}: apt-get install prometheus")
    return Path(found)
