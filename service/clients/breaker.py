"""Circuit breaker of the calls to an upstream."""

from __future__ import annotations

import time
from collections.abc import Callable

BREAKER_THRESHOLD = 5
"""Consecutive connection failures that open the breaker."""
FIRST_PAUSE_SECONDS = 10.0
MAX_PAUSE_SECONDS = 60.0
"""Each failed trial doubles the pause, up to this."""


class Attempt:
    """One connection attempt; its result is reported to the `Breaker`."""


class Breaker:
    """Circuit breaker over connection failures, the only failures that cost nothing.

    Failures caused by this machine do not count. While open it admits no attempt; after the pause it admits a single
    trial until the result of that is known. Attempts from before the opening may be reported at any time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failure_count = 0
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._open_until: float | None = None
        self._trial: Attempt | None = None

    @property
    def is_open(self) -> bool:
        """Return whether attempts are refused; False after the pause unless a trial is running."""
        until = self._open_until  # read once: the metrics thread calls this too
        return until is not None and (self._trial is not None or self._clock() < until)

    def admit(self) -> Attempt | None:
        """Return an attempt whose result must be reported once, or None if the breaker is open."""
        if self.is_open:
            return None
        attempt = Attempt()
        if self._open_until is not None:
            self._trial = attempt
        return attempt

    def on_connected(self, _: Attempt) -> None:
        self._failure_count = 0
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._open_until = self._trial = None

    def on_failed(self, attempt: Attempt) -> None:
        self._failure_count += 1
        if attempt is self._trial:
            self._pause_seconds = min(self._pause_seconds * 2, MAX_PAUSE_SECONDS)
            self._trial = None
        elif self._open_until is not None or self._failure_count < BREAKER_THRESHOLD:
            return
        self._open_until = self._clock() + self._pause_seconds

    def on_abandoned(self, attempt: Attempt) -> None:
        """Release the trial of an attempt that neither connected nor failed."""
        if attempt is self._trial:
            self._trial = None
