"""A TCP proxy that resets connections."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_NO_LINGER = struct.pack("ii", 1, 0)


class ResettingProxy:
    """Forwards to a port of 127.0.0.1.

    Each chunk, in either direction, is cut off and resets both sides with `reset_probability`.
    """

    def __init__(self, target: int, seed: int) -> None:
        self.port = 0
        self.reset_probability = 0.0
        self.resets = 0
        self.ready = threading.Event()
        self._target = target
        self._random = random.Random(seed)

    async def serve(self, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.loop = asyncio.get_running_loop()
        self.ready.set()
        await stop.wait()
        server.close()

    async def _forward(self, reader: StreamReader, writer: StreamWriter) -> None:
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

    async def _copy(self, source: StreamReader, target: StreamWriter, back: StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                if self._random.random() < self.reset_probability:
                    self.resets += 1
                    target.write(data[: self._random.randrange(len(data) + 1)])
                    for side in (target, back):
                        with suppress(OSError):
                            side.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
                        side.transport.abort()
                    return
                target.write(data)
        finally:
            target.close()


@contextmanager
def run_resetting_proxy(target: int, *, seed: int) -> Iterator[ResettingProxy]:
    """Run a proxy in a thread of its own."""
    proxy, stop = ResettingProxy(target, seed), asyncio.Event()
    thread = threading.Thread(target=asyncio.run, args=(proxy.serve(stop),))
    thread.start()
    proxy.ready.wait()
    try:
        yield proxy
    finally:
        proxy.loop.call_soon_threadsafe(stop.set)
        thread.join()
