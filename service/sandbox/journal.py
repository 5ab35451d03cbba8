"""The requests that were received, so that a test can count what reached the upstream and what it did about it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from service.sandbox.dials import Operation, Reply

_MOST: Final = 10_000

Outcome: TypeAlias = Literal["arrived", "not_reached", "accepted", "refused", "told", "served", "broken_off"]
"""What the upstream did with a request.

- `arrived`: nothing yet, it is still being looked at;
- `not_reached`: nothing, a fault came before;
- `accepted`: a submit became a task;
- `refused`: the answer is an error, and nothing else happened;
- `told`: a check found its task;
- `served`: a file was handed out;
- `broken_off`: the client left in the middle of the request.
"""


class Received(msgspec.Struct, kw_only=True):
    """One request.

    Attributes:
        at: when it had been read, in seconds since the epoch.
        path: it was sent to.
        task_id: of the task that was accepted, asked for or whose file it is; empty if there is none.
        outcome: what the upstream did with it.
        detail: the error message, or the state that was told.
        reply: how it was answered.
        image_bytes: size of the image; 0 if there was none.
        fields: the text fields, without the `user_key`.

    """

    operation: Operation
    path: str
    at: float = msgspec.field(default_factory=time.time)
    user_key: str = ""
    task_id: str = ""
    outcome: Outcome = "arrived"
    detail: str = ""
    reply: Reply = "json"
    image_bytes: int = 0
    fields: dict[str, str] = {}


class Journal:
    """Keeps the newest requests, oldest first."""

    def __init__(self) -> None:
        self._entries: deque[Received] = deque(maxlen=_MOST)
        self._changed = asyncio.Event()

    def add(self, entry: Received) -> None:
        """Write a request down."""
        self._entries.append(entry)
        self._notify()

    def update(self, entry: Received, outcome: Outcome, detail: str = "") -> None:
        """Write down what became of a request."""
        entry.outcome = outcome
        entry.detail = detail
        self._notify()

    def entries(self) -> list[Received]:
        """Give copies of all entries."""
        return [msgspec.structs.replace(entry) for entry in self._entries]

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._notify()

    async def until(self, holds: Callable[[Sequence[Received]], bool]) -> list[Received]:
        """Wait until something holds of the entries, and give them."""
        while not holds(entries := self.entries()):
            await self._changed.wait()
        return entries

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
