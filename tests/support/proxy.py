"""A TCP proxy that resets connections, stalls them, or loses answers."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

_NO_LINGER = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards to a port of 127.0.0.1.

    Each chunk, in either direction, is cut off and resets both sides with `reset_probability`.
    """

    def __init__(self, target: int, seed: int = 0) -> None:
        self.port = 0
        self.reset_probability = 0.0
        self.resets = 0
        self._target = target
        self._random = random.Random(seed)
        self._connections: dict[asyncio.Task[None], tuple[StreamWriter, ...]] = {}
        self._is_cut = False
        self._loses_answers = False
        self._flowing = asyncio.Event()
        self._flowing.set()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        """Accept connections within the block; end them all with it."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            forwarding = tuple(self._connections)
            for task in forwarding:
                task.cancel()
            await asyncio.gather(*forwarding, return_exceptions=True)

    async def cut(self, seconds: float = 0) -> None:
        """Reset all connections, and new ones for so long."""
        self._is_cut = True
        try:
            for sides in tuple(self._connections.values()):
                self._reset(*sides)
            await asyncio.sleep(seconds)
        finally:
            self._is_cut = False

    async def stall(self, seconds: float) -> None:
        """Forward nothing for so long. What was sent meanwhile arrives afterwards, even if its sender has left."""
        self._flowing.clear()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._flowing.set()

    async def lose_answers(self, seconds: float) -> None:
        """Forward requests, and instead of their answers reset the connection, for so long.

        Answers to the greeting of redis-py are forwarded: else a new connection would never come to a request.
        """
        self._loses_answers = True
        try:
            await asyncio.sleep(seconds)
        finally:
            self._loses_answers = False

    def _accept(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.create_task(self._forward(reader, writer))
        self._connections[task] = (writer,)
        task.add_done_callback(self._connections.pop)

    async def _forward(self, reader: StreamReader, writer: StreamWriter) -> None:
        if self._is_cut:
            self._reset(writer)
            return
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        task = asyncio.current_task()
        assert task
        self._connections[task] = (writer, inner_writer)
        greeted = asyncio.Event()
        await asyncio.gather(
            self._copy(reader, inner_writer, writer, greeted),
            self._copy(inner_reader, writer, inner_writer, greeted, has_answers=True),
            return_exceptions=True,
        )

    async def _copy(
        self,
        source: StreamReader,
        target: StreamWriter,
        back: StreamWriter,
        greeted: asyncio.Event,
        *,
        has_answers: bool = False,
    ) -> None:
        try:
            while data := await source.read(65_536):
                await self._flowing.wait()
                if has_answers and self._loses_answers and greeted.is_set():
                    self._reset(target, back)
                    return
                if not has_answers and b"SETINFO" not in data:
                    greeted.set()
                if self._random.random() < self.reset_probability:
                    target.write(data[: self._random.randrange(len(data) + 1)])
                    self._reset(target, back)
                    return
                target.write(data)
        finally:
            target.close()

    def _reset(self, *sides: StreamWriter) -> None:
        self.resets += 1
        for side in sides:
            with suppress(OSError):
                side.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            side.transport.abort()


@contextmanager
def run_thread_proxy(target: int, *, seed: int) -> Iterator[Proxy]:
    """Run a proxy in a thread of its own."""
    proxy, started, stop = Proxy(target, seed), threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        async with proxy.serve():
            loops.append(asyncio.get_running_loop())
            started.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    started.wait()
    try:
        yield proxy
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join()
