"""Changes of tasks, as every process announces them to all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from msgspec import MsgspecError
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from service.storage.scripts import Fault, sort_of
from service.storage.tasks import unpacked_change
from service.usecases.task_cache import Board

_log = structlog.get_logger(__name__)

AWAY_SECONDS = 1.0
_LISTEN_SECONDS = 5.0


class Changes:
    """Posts announced changes on the board of this process."""

    def __init__(
        self, subscribe: Callable[[], Awaitable[PubSub]], channel: str, board: Board, *, failed: Fault | None = None
    ) -> None:
        self._failed = failed
        self._subscribe = subscribe
        self._channel = channel
        self._board = board

    async def follow(self) -> None:
        """Listen for ever, through any loss of the connection; what is missed meanwhile, waiters read by themselves."""
        while True:
            try:
                await self._listen()
            except RedisError as error:
                if self._failed:
                    self._failed(sort_of(error))
                await asyncio.sleep(AWAY_SECONDS)

    async def _listen(self) -> None:
        async with await self._subscribe() as channel:
            await channel.subscribe(self._channel)
            while True:
                message = await channel.get_message(ignore_subscribe_messages=True, timeout=_LISTEN_SECONDS)
                if message:
                    self._take_in(message["data"])

    def _take_in(self, message: bytes) -> None:
        try:
            change = unpacked_change(message)
        except MsgspecError:  # of another version of the gateway; waiters read by themselves
            _log.warning("change.garbled")
        else:
            self._board.announced(*change)
