"""Many requests at a time on one connection to Redis."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import DataError, InvalidResponse, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError


class Multiplexer:
    """Sends requests of short commands over one connection of a client's pool, without waiting for each other.

    Each request is sent at most once. One without an answer in time, or on a connection that breaks, raises a
    RedisError: its commands may have been carried out. That connection takes no more requests, and the next one opens
    another. The pool connects (to the primary that Sentinel names, with TLS, password and database); its size bounds
    the requests under way, and its timeout their wait. A command that blocks would delay all others: such a one needs
    a connection of its own.
    """

    def __init__(self, client: Redis) -> None:
        self._pool = client.connection_pool
        self._callbacks: dict[Any, Callable[..., Any]] = dict(client.response_callbacks)
        self._wait_seconds: float | None = getattr(self._pool, "timeout", None)
        self._slots = asyncio.Semaphore(self._pool.max_connections)
        self._shared: _SharedConnection | None = None
        self._opening: asyncio.Task[_SharedConnection] | None = None

    async def execute(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Send commands at once and return their answers. Raises a RedisError, or the first one that Redis answered."""
        if not commands:
            return []
        try:
            packed = b"".join(map(hiredis.pack_command, commands))
        except TypeError as error:
            raise DataError(str(error)) from error
        if self._slots.locked():
            await self._wait_for_slot()
        else:
            await self._slots.acquire()  # does not wait
        try:
            shared = self._shared if self._shared and self._shared.is_usable else await self._open()
            answers = await shared.send(packed, len(commands))
        finally:
            self._slots.release()
        for index, answer in enumerate(answers):
            if isinstance(answer, Exception):
                raise answer
            if callback := self._callbacks.get(commands[index][0]):
                answers[index] = callback(answer)
        return answers

    async def _wait_for_slot(self) -> None:
        try:
            async with asyncio.timeout(self._wait_seconds):
                await self._slots.acquire()
        except TimeoutError:
            raise RedisConnectionError("No connection available.") from None

    async def _open(self) -> _SharedConnection:
        """Open a connection in one attempt that all requests share; one that is cancelled does not end it."""
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._replace())
            self._opening.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._opening)

    async def _replace(self) -> _SharedConnection:
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call] # redis-py's own
        self._shared = _SharedConnection(self._pool, connection)
        return self._shared


class _Request:
    __slots__ = ("answer_count", "answers", "deadline", "future")

    def __init__(self, answer_count: int, deadline: float, future: asyncio.Future[list[Any]]) -> None:
        self.answer_count = answer_count
        self.answers: list[Any] = []
        self.deadline = deadline
        self.future = future


class _SharedConnection:
    """An open connection: answers come in the order of the requests. It goes back to its pool by itself.

    An answer for which its request no longer waits is read and dropped. After a time-out, or an error by which the
    server refuses to be the primary, the requests under way still get their answers, but no more are sent.
    """

    def __init__(self, pool: ConnectionPool, connection: AbstractConnection) -> None:
        self.is_usable = True
        self._pool, self._connection = pool, connection
        # Deadlines replace the timeouts of single reads, of which one waits all the time, and writes.
        self._timeout, connection.socket_timeout = connection.socket_timeout, None
        self._loop = asyncio.get_running_loop()
        self._requests: deque[_Request] = deque()
        self._unsent: list[bytes] = []
        self._has_unsent = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._running = asyncio.create_task(self._run())

    def send(self, packed: bytes, answer_count: int) -> asyncio.Future[list[Any]]:
        """Send a request with those of this iteration of the loop; return its answers, to be awaited."""
        if not self.is_usable:
            raise RedisConnectionError("The connection was lost before the request was sent.")
        self._unsent.append(packed)
        self._has_unsent.set()
        request = _Request(answer_count, self._loop.time() + (self._timeout or 0), self._loop.create_future())
        self._requests.append(request)
        if self._timer is None and self._timeout:
            self._timer = self._loop.call_at(request.deadline, self._check_deadlines)
        return request.future

    async def _run(self) -> None:
        """Read answers until the connection is lost or given up; then fail the requests under way, and release it."""
        sending, reason = asyncio.create_task(self._write()), "The connection was given up."
        try:
            await self._read()
        except RedisError as error:
            reason = f"{type(error).__name__}: {error}"
        finally:
            self.is_usable = False
            if self._timer:
                self._timer.cancel()
            for request in self._requests:
                _fail(request, RedisConnectionError(reason))
            self._requests.clear()
            sending.cancel()
            await asyncio.wait([sending])
            await self._connection.disconnect(nowait=True)
            self._connection.socket_timeout = self._timeout
            await self._pool.release(self._connection)

    async def _write(self) -> None:
        with suppress(RedisError):  # redis-py has closed the connection, which also ends `_read`
            while await self._has_unsent.wait():
                self._has_unsent.clear()
                packed, self._unsent = b"".join(self._unsent), []
                if not self._connection.is_connected:
                    return  # redis-py would open it again
                await self._connection.send_packed_command(packed, check_health=False)

    async def _read(self) -> None:
        while self.is_usable or self._requests:
            answer: Any
            try:
                answer = await self._connection.read_response(disconnect_on_error=False)
            except ResponseError as error:
                answer = error
                if isinstance(error, ReadOnlyError):
                    self.is_usable = False
            if not self._requests:
                raise InvalidResponse("an answer without a request")
            request = self._requests[0]
            request.answers.append(answer)
            if len(request.answers) == request.answer_count:
                self._requests.popleft()
                if not request.future.done():
                    request.future.set_result(request.answers)

    def _check_deadlines(self) -> None:
        """Fail the requests that waited too long. One timer serves all, since the first one is the oldest."""
        self._timer = None
        for request in self._requests:
            if request.deadline > self._loop.time():
                self._timer = self._loop.call_at(request.deadline, self._check_deadlines)
                return
            self.is_usable = False
            _fail(request, RedisTimeoutError("Redis did not answer in time."))
        if not self.is_usable:
            self._running.cancel()


def _fail(request: _Request, error: RedisError) -> None:
    if not request.future.done():
        request.future.set_exception(error)
