"""The time of this process."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """The time of this process."""

    def now(self) -> float:
        """Seconds since the epoch."""
        ...
