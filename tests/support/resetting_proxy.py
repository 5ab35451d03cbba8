"""A TCP proxy that resets connections."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class ResettingProxy:
    """Forwards to a port of 127.0.0.1 in a thread of its own.

    Each chunk, in either direction, is cut off and resets both sides with `reset_probability`.
    """

    def __init__(self, target: int, seed: int) -> None:
        self.port = 0
        self.reset_probability = 0.0
        self.resets = 0
        self._target = target
        self._random = random.Random(seed)
        self._connections: set[asyncio.Task[None]] = set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        forwarding = asyncio.create_task(self._forward(reader, writer))
        self._connections.add(forwarding)
        forwarding.add_done_callback(self._connections.discard)

    async def close(self) -> None:
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            self._copy(reader, inner_writer, writer),
            self._copy(inner_reader, writer, inner_writer),
            return_exceptions=True,
        )

    async def _copy(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, back: asyncio.StreamWriter
    ) -> None:
        try:
            while data := await source.read(65_536):
                if self._random.random() < self.reset_probability:
                    target.write(data[: self._random.randrange(len(data) + 1)])
                    self._reset(target, back)
                    return
                target.write(data)
        finally:
            target.close()

    def _reset(self, *sides: asyncio.StreamWriter) -> None:
        self.resets += 1
        for side in sides:
            with suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                side.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            side.transport.abort()


@contextmanager
def run_resetting_proxy(target: int, *, seed: int) -> Iterator[ResettingProxy]:
    proxy = ResettingProxy(target, seed)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(proxy.accept, "127.0.0.1", 0), loop).result()
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(server.close)
        asyncio.run_coroutine_threadsafe(proxy.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
