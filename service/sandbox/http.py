"""HTTP requests and responses on top of ASGI, and faults of their connections."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
TRANSPORT_EXTENSION: Final = "service.sandbox.transport"
"""The extension of the scope that holds the transport of the connection, which ASGI does not give access to."""
JSON_TYPE: Final = "application/json"
TEXT_TYPE: Final = "text/plain; charset=utf-8"
_NO_LINGER: Final = struct.pack("ii", 1, 0)


class ClientDisconnectedError(Exception):
    """The connection ended in the middle of the request."""


class Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self.method: str = scope["method"]
        self.path: str = scope["path"]

    def header(self, name: str) -> str:
        """Return a header of the request, empty if absent."""
        encoded_name = name.lower().encode()
        return next((value.decode("latin-1") for key, value in self._scope["headers"] if key == encoded_name), "")

    @property
    def base_url(self) -> str:
        """The address of the sandbox as the client uses it."""
        host, port = self._scope["server"]
        return f"{self._scope['scheme']}://{self.header('host') or f'{host}:{port}'}"

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the body in chunks. Raises ClientDisconnectedError."""
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnectedError
            yield message.get("body", b"")
            more = message.get("more_body", False)

    async def read_body(self) -> bytes:
        """Return the complete body. Raises ClientDisconnectedError."""
        return b"".join([chunk async for chunk in self.body()])

    async def wait_closed(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def close_connection(self, *, reset: bool = False) -> None:
        """Close the connection after the bytes written so far, or with a TCP reset."""
        transport: asyncio.Transport = self._scope["extensions"][TRANSPORT_EXTENSION]
        if reset:
            # Closing a socket without lingering sends a TCP reset.
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            transport.abort()
        else:
            transport.close()
        await self.wait_closed()

    async def send_head(self, status: int, content_type: str, length: int, **headers: str) -> None:
        """Send the status and the headers; an underscore in a header name becomes a hyphen."""
        fields = {"content-type": content_type, "content-length": str(length), **headers}
        raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in fields.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def send_body(self, body: bytes, *, more: bool = False) -> None:
        """Send a chunk of the body, by default the last."""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def respond(self, status: int, content_type: str, body: bytes) -> None:
        await self.send_head(status, content_type, len(body))
        await self.send_body(body)
