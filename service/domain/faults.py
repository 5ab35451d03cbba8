"""Faults of what was sent: all of them at once, each with the place where it stands."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from service.domain.errors import FieldError, InvalidOptions

P = ParamSpec("P")
R = TypeVar("R")

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dotted(*keys: str) -> str:
    """Where something stands, as TOML says it: `tenants.shop.max_active`, with quotes around what needs them."""
    return ".".join(each if _BARE.fullmatch(each) else f'"{each}"' for each in keys)


def meant(word: str, known: Iterable[str]) -> str:
    """A question to end a sentence with, about the word that was probably meant; empty if none comes near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {near[0]}?" if near else ""


class Faults:
    """Gathers faults, to tell them together."""

    def __init__(self) -> None:
        self.found: list[FieldError] = []

    def add(self, field: str, detail: str) -> None:
        """There is a fault."""
        self.found.append(FieldError(field, detail))

    def attempt(self, where: str, instead: R, make: Callable[P, R], *args: P.args, **more: P.kwargs) -> R:
        """What `make` makes, or `instead` if it raises InvalidOptions, whose fields stand below `where` if given."""
        try:
            return make(*args, **more)
        except InvalidOptions as error:
            for each in error.errors:
                self.add(f"{where}.{each.field}" if where else each.field, each.detail)
            return instead

    def check(self) -> None:
        """Raise InvalidOptions if there is a fault."""
        if self.found:
            raise InvalidOptions(self.found)
