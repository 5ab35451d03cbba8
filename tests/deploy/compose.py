"""The compose file as an engine reads it: with the variables of somebody's environment put in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "compose.yaml"

_NAME = re.compile(r"(?P<name>[A-Z_]+)(?:(?P<how>:[-+?])(?P<rest>.*))?", re.DOTALL)


class MissingError(Exception):
    """A variable that has to be given is not; the message is what compose would say."""


def composed(**environ: str) -> Mapping[str, Any]:
    """The whole file. Raises MissingError."""
    found: Mapping[str, Any] = _filled(yaml.safe_load(FILE.read_text("utf-8")), environ)
    return found


def settings(service: Mapping[str, Any]) -> Mapping[str, str]:
    """The environment of a container of our image: what the image has, and what the file puts over it."""
    image = re.findall(r"(GATEWAY_\w+)=(\S+)", (ROOT / "Dockerfile").read_text("utf-8"))
    return {**dict(image), **service.get("environment", {})}


def interpolated(text: str, environ: Mapping[str, str]) -> str:
    """A text with `${NAME}`, `${NAME:-otherwise}`, `${NAME:+instead}` and `${NAME:?complaint}` replaced, also in one
    another. Raises MissingError.
    """
    before, begun, rest = text.partition("${")
    if not begun:
        return text
    depths = accumulate(({"{": 1, "}": -1}.get(each, 0) for each in rest), initial=1)
    end = list(depths).index(0) - 1
    return before + _value(rest[:end], environ) + interpolated(rest[end + 1 :], environ)


def _value(words: str, environ: Mapping[str, str]) -> str:
    found = _NAME.fullmatch(words)
    if not found:
        raise ValueError(f"${{{words}}} is not understood")
    given = environ.get(found["name"], "")
    match found["how"]:
        case ":?" if not given:
            raise MissingError(f"{found['name']} {found['rest']}")
        case ":-" if not given:
            return interpolated(found["rest"], environ)
        case ":+":
            return interpolated(found["rest"], environ) if given else ""
    return given


def _filled(value: Any, environ: Mapping[str, str]) -> Any:
    match value:
        case str():
            return interpolated(value, environ)
        case list():
            return [_filled(each, environ) for each in value]
        case dict():
            return {name: _filled(each, environ) for name, each in value.items()}
    return value
