"""The compose files with variables interpolated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "compose.yaml"
UPSTREAM = ROOT / "deploy" / "compose.upstream.yaml"

_NAME = re.compile(r"(?P<name>[A-Z_]+)(?:(?P<how>:[-?])(?P<rest>.*))?", re.DOTALL)


class MissingVariableError(Exception):
    """A required variable is missing; the message is that of compose."""


def load_compose(*files: Path, **environ: str) -> Mapping[str, Any]:
    """Load the compose file, with others merged over it. Raises MissingVariableError."""
    results: Mapping[str, Any] = {}
    for file in (FILE, *files):
        results = _merge(results, _interpolate_all(yaml.safe_load(file.read_text("utf-8")), environ))
    return results


def container_settings(service: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the settings of a container: those of the image, overridden by the file."""
    image = re.findall(r"(GATEWAY_\w+)=(\S+)", (ROOT / "Dockerfile").read_text("utf-8"))
    return {**dict(image), **service.get("environment", {})}


def interpolate(text: str, environ: Mapping[str, str]) -> str:
    """Replace `${NAME}`, `${NAME:-default}` and `${NAME:?error}`, also nested.

    Like compose, evaluate the part after a name even if unused. Raises MissingVariableError.
    """
    before, started_at, rest = text.partition("${")
    if not started_at:
        return text
    depths = accumulate(({"{": 1, "}": -1}.get(item, 0) for item in rest), initial=1)
    end = list(depths).index(0) - 1
    return before + _resolve(rest[:end], environ) + interpolate(rest[end + 1 :], environ)


def _resolve(words: str, environ: Mapping[str, str]) -> str:
    match = _NAME.fullmatch(words)
    if not match:
        raise ValueError(f"${{{words}}} is not understood")
    value, otherwise = environ.get(match["name"], ""), interpolate(match["rest"] or "", environ)
    if match["how"] == ":?" and not value:
        raise MissingVariableError(f"required variable {match['name']} is missing a value: {otherwise}")
    return value or otherwise


def _merge(below: Any, above: Any) -> Any:
    """Merge mappings, and replace everything else."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {name: _merge(below.get(name), item) for name, item in above.items()}


def _interpolate_all(value: Any, environ: Mapping[str, str]) -> Any:
    match value:
        case str():
            return interpolate(value, environ)
        case list():
            return [_interpolate_all(item, environ) for item in value]
        case dict():
            return {name: _interpolate_all(item, environ) for name, item in value.items()}
    return value
