"""Where the secrets of a registry that is kept in a file are."""

from __future__ import annotations

from msgspec import Struct


class Origin(Struct, frozen=True, omit_defaults=True):
    """Where whoever applies the registry finds a secret: in a variable of the environment, or in a file.

    The gateway never looks there: it only remembers, so that the registry it writes out can be applied again.
    """

    env: str | None = None
    file: str | None = None
