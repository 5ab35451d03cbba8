"""The HTTP that the sandbox needs."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Final, Protocol, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
CONNECTION_EXTENSION: Final = "service.sandbox.connection"
"""The extension of the scope that holds the request's `Connection`."""
JSON_TYPE: Final = "application/json"


class Connection(Protocol):
    """The TCP connection of a request, which plain ASGI hides."""

    def reset(self) -> None:
        """Drop it so that the other side sees a reset."""

    def close_gracefully(self) -> None:
        """Close it in order, after what was written so far."""


class ClientDisconnectedError(Exception):
    """The connection ended in the middle of the request."""


class Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self.method: str = scope["method"]
        self.path: str = scope["path"]

    def header(self, name: str) -> str:
        """Give a header of the request; empty if it has none of this name."""
        wanted = name.lower().encode()
        return next((value.decode("latin-1") for key, value in self._scope["headers"] if key == wanted), "")

    @property
    def base_url(self) -> str:
        """The sandbox's own address as this client knows it."""
        host, port = self._scope["server"]
        return f"{self._scope['scheme']}://{self.header('host') or f'{host}:{port}'}"

    @property
    def connection(self) -> Connection:
        """The connection of this request.

        Raises:
            KeyError: the server is not that of `service.sandbox.server`.

        """
        connection: Connection = self._scope["extensions"][CONNECTION_EXTENSION]
        return connection

    async def body(self) -> AsyncIterator[bytes]:
        """Give the body piece by piece.

        Raises:
            ClientLeftError: it ended before it was whole.

        """
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnectedError
            yield message.get("body", b"")
            more = message.get("more_body", False)

    async def wait_closed(self) -> None:
        """Wait until the connection has ended."""
        with contextlib.suppress(ClientDisconnectedError):
            while True:
                async for _ in self.body():
                    pass

    async def send_head(self, status: int, content_type: str, length: int, **headers: str) -> None:
        """Send the head of the answer; an underscore in a header's name stands for a hyphen."""
        fields = {"content-type": content_type, "content-length": str(length), **headers}
        raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in fields.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def send_body(self, body: bytes, *, more: bool = False) -> None:
        """Send a piece of the answer's body, by default the last."""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def respond(self, status: int, content_type: str, body: bytes) -> None:
        """Send a whole answer."""
        await self.send_head(status, content_type, len(body))
        await self.send_body(body)
