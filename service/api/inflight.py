"""How many bytes of uploads may be in memory at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct

from service.domain.errors import Overloaded

STEP = 64 * 1024
"""What a share grows by, in bytes: with it goes how much an upload may hold that it has not filled yet."""


class Share(Struct, eq=False):
    """What one upload may come to hold, and what it holds, in bytes."""

    need: int
    held: int = 0

    @property
    def rest(self) -> int:
        """What it lacks to be whole."""
        return self.need - self.held


class _Place(Struct, eq=False):
    """A place in the line: a share that waits to hold `wanted` bytes."""

    share: Share
    wanted: int
    granted: asyncio.Future[None]


class InFlight:
    """Bytes that uploads share. Each takes them as it arrives, so that who only announces much keeps nobody out.

    It must never come to all waiting for the rest of their bytes while none can get them. Hence a share grows only as
    long as there is some order in which all that have begun can become whole, each from what is free and what those
    before it gave back (the banker's algorithm). Who does not fit waits in line, and is overtaken only by those that
    have begun and can become whole at once: by no newcomer, else a large upload would wait forever under load.
    """

    def __init__(self, total: int, wait_seconds: float) -> None:
        self.total = self._free = total
        self._wait_seconds = wait_seconds
        self._begun: set[Share] = set()
        self._line: list[_Place] = []

    @property
    def held(self) -> int:
        """How many bytes are held now."""
        return self.total - self._free

    @contextmanager
    def share(self, need: int) -> Iterator[Share]:
        """An empty share of an upload of at most `need` bytes, given back after the block.

        What is larger than the whole can be whole once it holds everything.
        """
        share = Share(min(need, self.total))
        try:
            yield share
        finally:
            self._free += share.held
            share.held = 0
            self._begun.discard(share)
            self._serve()

    async def grow(self, share: Share, size: int) -> None:
        """Have a share hold at least `size` bytes, or all it needs.

        Raises Overloaded if they did not come free in time.
        """
        wanted = min(-(-size // STEP) * STEP, share.need)
        if wanted <= share.held:
            return
        place = _Place(share, wanted, asyncio.get_running_loop().create_future())
        self._line.append(place)
        self._serve()
        try:
            async with asyncio.timeout(self._wait_seconds):
                await place.granted
        except TimeoutError:
            detail = "Too many uploads are under way. Send the image again later."
            raise Overloaded(detail, retry_after=self._wait_seconds) from None
        finally:
            if place in self._line:
                self._line.remove(place)
                self._serve()

    def complete(self, share: Share, size: int) -> None:
        """The upload is whole with `size` bytes: the share keeps those at most, and needs no more."""
        kept = min(size, share.held)
        self._free += share.held - kept
        share.need = share.held = kept
        self._serve()

    def _serve(self) -> None:
        """Grant what can be granted, in the order of the line."""
        waiting: list[_Place] = []
        for place in self._line:
            if self._may_grow(place, overtaking=bool(waiting)):
                self._free -= place.wanted - place.share.held
                place.share.held = place.wanted
                self._begun.add(place.share)
                if not place.granted.done():
                    place.granted.set_result(None)
            else:
                waiting.append(place)
        self._line = waiting

    def _may_grow(self, place: _Place, *, overtaking: bool) -> bool:
        if overtaking:
            return place.share.held > 0 and place.share.rest <= self._free
        return place.share.rest <= self._free or self._safe_with(place)

    def _safe_with(self, place: _Place) -> bool:
        """Whether all can still become whole after this step: those who lack least go first."""
        free = self._free - (place.wanted - place.share.held)
        others = [(each.rest, each.held) for each in self._begun if each is not place.share]
        for rest, held in sorted([*others, (place.share.need - place.wanted, place.wanted)]):
            if rest > free:
                return False
            free += held
        return True
