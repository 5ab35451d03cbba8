"""Saying how the tasks are doing: redrawn in place on a terminal, a line per change elsewhere."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TextIO

ENDED = frozenset({"succeeded", "failed", "no task", "timed out"})
REDRAW_SECONDS = 0.2
_SPINNER = "|/-\\"
_UP_AND_CLEAR = "\x1b[{lines}F\x1b[J"


class Progress(Protocol):
    def note(self, kind: str, state: str) -> None:
        """Take in the state of a task, changed or not."""

    async def animate(self) -> None:
        """Keep what is shown fresh; runs until cancelled, or returns at once where there is nothing to do."""

    def clear(self) -> None:
        """Make room for the table."""


class LineProgress:
    """One line for each change, fit for a log."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._states: dict[str, str] = {}

    def note(self, kind: str, state: str) -> None:
        if self._states.get(kind) != state:
            self._states[kind] = state
            self._output.write(f"{kind}: {state}\n")
            self._output.flush()

    async def animate(self) -> None:
        """Lines that were written stay as they are."""

    def clear(self) -> None:
        self._output.write("\n")


class LiveProgress:
    """One line for each task, redrawn with its state and the seconds it has taken."""

    def __init__(self, output: TextIO, kinds: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._begin = clock()
        self._states = dict.fromkeys(kinds, "waiting")
        self._ends: dict[str, float] = {}
        self._turn = 0
        self._drawn = 0

    def note(self, kind: str, state: str) -> None:
        self._states[kind] = state
        if state in ENDED:
            self._ends.setdefault(kind, self._clock())
        self._draw()

    async def animate(self) -> None:
        while True:
            self._turn += 1
            self._draw()
            await asyncio.sleep(REDRAW_SECONDS)

    def clear(self) -> None:
        self._output.write(self._rewind())
        self._output.flush()
        self._drawn = 0

    def _draw(self) -> None:
        now = self._clock()
        width = max(map(len, self._states))
        lines = [
            f"{' ' if kind in self._ends else _SPINNER[self._turn % len(_SPINNER)]} {kind:<{width}}  {state:<10}"
            f" {self._ends.get(kind, now) - self._begin:6.1f} s\n"
            for kind, state in self._states.items()
        ]
        self._output.write(self._rewind() + "".join(lines))
        self._output.flush()
        self._drawn = len(lines)

    def _rewind(self) -> str:
        return _UP_AND_CLEAR.format(lines=self._drawn) if self._drawn else ""
