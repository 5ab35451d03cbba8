"""What waits to be done."""

from __future__ import annotations

from msgspec import Struct


class Backlog(Struct, frozen=True):
    """How much waits, and for how many milliseconds the first of it has been due without being taken; 0 if none has."""

    length: int
    overdue: int
