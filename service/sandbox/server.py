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

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.sandbox.app import SandboxConfig, create_sandbox
from service.sandbox.asgi import CONNECTION
from service.sandbox.control import Control

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


class _Protocol(HttpToolsProtocol):
    """Uvicorn's HTTP, with the connection itself within reach of the application."""

    def __init__(self, config: Config, state: ServerState) -> None:
        super().__init__(config, state, {})
        # Its logger belongs to whoever else runs uvicorn in this process.
        self.access_log = False

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

    This takes uvicorn's protocol without its server, which would install signal handlers and take a fifth of a second
    to stop.

    Raises:
        OSError: the address or the folder can't be used.

    """
    sandbox = create_sandbox(config)
    async with sandbox.open() as control:
        settings = Config(
            sandbox,
            interface="asgi3",
            lifespan="off",
            ws="none",
            log_config=None,
            proxy_headers=False,
            # Uvicorn's 5 s are just as long as common clients keep a connection: they would send into the close.
            timeout_keep_alive=75,
        )
        settings.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Protocol(settings, state), host, port)
        try:
            yield RunningSandbox(_url(host, server.sockets[0].getsockname()[1]), control)
        finally:
            server.close()
            sandbox.hurry()
            while state.connections or state.tasks:
                for connection in state.connections:
                    connection.transport.abort()
                # Handlers end by themselves when their connection does; cancelled ones would be logged as crashes.
                await asyncio.wait({*state.tasks, asyncio.ensure_future(asyncio.sleep(0))})
            await server.wait_closed()


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


def _url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
