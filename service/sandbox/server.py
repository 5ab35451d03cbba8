"""Listens for a sandbox: inside a process for tests, or as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

from service.sandbox.app import SandboxConfig, create_sandbox
from service.sandbox.asgi import CONNECTION
from service.sandbox.control import Control
from service.server import HttpProtocol, HttpServer, base_url, listen

_NO_LINGER: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class RunningSandbox:
    """A sandbox that listens.

    Attributes:
        url: its base address.
        control: its control side.

    """

    url: str
    control: Control


class _Protocol(HttpProtocol):
    """A connection that the application can reach."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        extensions: dict[str, Any] = {CONNECTION: self}
        self.scope["extensions"] = extensions

    def reset(self) -> None:
        """Drop the connection; a socket that may not linger is closed by a TCP reset."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()

    def hang_up(self) -> None:
        """Close the connection after what was written so far."""
        self.transport.close()


@contextlib.asynccontextmanager
async def running(config: SandboxConfig, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[RunningSandbox]:
    """Run a sandbox in this event loop; at the end cut its connections and close it.

    Raises:
        OSError: the address or the folder can't be used.

    """
    sandbox = create_sandbox(config)
    async with sandbox.open() as control:
        server = HttpServer(sandbox, protocol=_Protocol)
        listening = listen(host, port)
        url = base_url(listening)
        server.start(listening)
        try:
            yield RunningSandbox(url, control)
        finally:
            sandbox.hurry()
            await server.stop()


async def serve(config: SandboxConfig, host: str, port: int, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Run a sandbox until the process is told to end (SIGINT, SIGTERM) or this is cancelled.

    Args:
        config: of the sandbox.
        host: to listen on.
        port: to listen on; 0 for any that is free.
        on_ready: called with the base address as soon as it listens.

    Raises:
        OSError: the address or the folder can't be used.

    """
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    try:
        async with running(config, host, port) as sandbox:
            if on_ready is not None:
                on_ready(sandbox.url)
            await ended.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
