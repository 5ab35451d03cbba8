"""Stops asking an upstream that can't be reached, and notices when it can be again."""

from __future__ import annotations

from collections.abc import Callable

THRESHOLD = 5
"""So many failures to connect in a row open it."""
FIRST_PAUSE = 10.0
LONGEST_PAUSE = 60.0
"""Seconds that it stays open at first, and at most: each trial that fails doubles the pause."""


class Attempt:
    """One attempt to connect, for which `Breaker` wants to hear what became of it."""


class Breaker:
    """Whether it is worth trying to connect. It counts failures to connect only, since they alone cost nothing,
    and of these not the ones that are the fault of this machine.

    While it is open nobody is admitted. After the pause one attempt is, as a trial, and no other until it is known what
    became of that. Attempts from before it opened may still be reported at any time.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures = 0
        self._pause = FIRST_PAUSE
        self._open_until: float | None = None
        self._trial: Attempt | None = None

    @property
    def is_open(self) -> bool:
        """Whether an attempt is not admitted just now; no longer once the pause is over, though nobody may try then."""
        until = self._open_until  # once, as another thread asks
        return until is not None and (self._trial is not None or self._clock() < until)

    def admit(self) -> Attempt | None:
        """An attempt, to be reported once by one of the methods below; None where it is not worth trying."""
        if self.is_open:
            return None
        attempt = Attempt()
        if self._open_until is not None:
            self._trial = attempt
        return attempt

    def connected(self, _: Attempt) -> None:
        """A connection was made: all is well again, whoever made it."""
        self._failures = 0
        self._pause = FIRST_PAUSE
        self._open_until = self._trial = None

    def failed(self, attempt: Attempt) -> None:
        """No connection could be made."""
        self._failures += 1
        if attempt is self._trial:
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
            self._trial = None
        elif self._open_until is not None or self._failures < THRESHOLD:
            return
        self._open_until = self._clock() + self._pause

    def withdrawn(self, attempt: Attempt) -> None:
        """It was given up before it came to a connection or a failure, so another one may be the trial."""
        if attempt is self._trial:
            self._trial = None
