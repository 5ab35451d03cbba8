"""How many bytes of uploads may be in memory at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.domain.errors import Overloaded


class InFlight:
    """Bytes that uploads share, handed out in the order of asking.

    The first in line is never overtaken by a smaller one: else a large upload would wait forever under load.
    """

    def __init__(self, total: int, wait_seconds: float) -> None:
        self._total = self._free = total
        self._wait_seconds = wait_seconds
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Hold `size` bytes within the block; what is larger than the whole runs alone.

        Raises Overloaded if no place came free in time.
        """
        size = min(size, self._total)
        await self._take(size)
        try:
            yield
        finally:
            self._give_back(size)

    async def _take(self, size: int) -> None:
        if not self._line and size <= self._free:
            self._free -= size
            return
        place = size, asyncio.get_running_loop().create_future()
        self._line.append(place)
        try:
            async with asyncio.timeout(self._wait_seconds):
                await place[1]
        except BaseException as error:
            if place in self._line:
                self._line.remove(place)
                self._give_back(0)
            else:  # it was granted in the very moment of giving up
                self._give_back(size)
            if isinstance(error, TimeoutError):
                detail = "Too many uploads are under way. Send the image again later."
                raise Overloaded(detail, retry_after=self._wait_seconds) from None
            raise

    def _give_back(self, size: int) -> None:
        self._free += size
        while self._line and self._line[0][0] <= self._free:
            granted, future = self._line.popleft()
            self._free -= granted
            if not future.cancelled():
                future.set_result(None)
