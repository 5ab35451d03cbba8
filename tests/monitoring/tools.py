"""Paths of the programs of Prometheus, which are no Python packages."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def find_promtool() -> Path:
    """Return the path of promtool. Raises FileNotFoundError that names the package."""
    return _find_program("promtool")


def find_prometheus() -> Path:
    """Return the path of the server. Raises FileNotFoundError that names the package."""
    return _find_program("prometheus")


def _find_program(name: str) -> Path:
    """Find a program by the variable of its name in capitals, otherwise on the PATH."""
    result = shutil.which(os.environ.get(name.upper(), name))
    if result is None:
        raise FileNotFoundError(f"there is no {name}: apt-get install prometheus")
    return Path(result)
