"""A scripted server that records the requests it receives."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tests.support.images import make_png

PNG_IMAGE = make_png()


@dataclass
class ScriptedServer:
    """Connections made to the server, and requests received with heads and bodies."""

    url: str = ""
    connections: int = 0
    requests: list[tuple[bytes, bytes]] = field(default_factory=list)
    request_received: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class Connection:
    server: ScriptedServer
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def receive(self) -> str:
        """Read one request; return its head, empty at the end of the connection."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            body = await self.reader.readexactly(int(lengths[0].partition(b":")[2])) if lengths else b""
        except (asyncio.IncompleteReadError, OSError):
            return ""
        self.server.requests.append((head, body))
        self.server.request_received.set()
        return head.decode()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()

    async def wait_closed(self) -> None:
        """Send nothing until the client disconnects."""
        while await self.reader.read(65_536):
            pass


Handler: TypeAlias = Callable[[Connection], Awaitable[None]]


def response_head(status: int = 200, **headers: str) -> bytes:
    """Return a response head without the fields whose value is empty; the type is PNG by default."""
    fields = {"Content_Type": "image/png"} | headers
    lines = "".join(f"{name.replace('_', '-')}: {text}\r\n" for name, text in fields.items() if text)
    return f"HTTP/1.1 {status} x\r\n{lines}\r\n".encode()


def file_response(content: bytes = PNG_IMAGE, status: int = 200, **headers: str) -> bytes:
    """Return a response with its length, of the type PNG by default."""
    return response_head(status, **({"Content_Length": str(len(content))} | headers)) + content


def http_response(body: bytes, status: int = 200, **headers: str) -> bytes:
    """Return a response with its length, without a type by default."""
    return file_response(body, status, **({"Content_Type": ""} | headers))


def chunked_body(*chunks: bytes, end: bool = True, trailer: bytes = b"") -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return body + b"0\r\n" + trailer + b"\r\n" if end else body


def vendor_response(**content: Any) -> bytes:
    return http_response(json.dumps(content).encode(), Content_Type="application/json")


ACCEPTED_RESPONSE = vendor_response(err_code=0, task_id="t-1", remaining_count=4, remaining_money=2)


def reply_with(*pieces: bytes) -> Handler:
    async def serve(connection: Connection) -> None:
        while await connection.receive():
            for piece in pieces:
                await connection.send(piece)

    return serve


def reply_and_close(*pieces: bytes) -> Handler:
    async def serve(connection: Connection) -> None:
        await connection.receive()
        for piece in pieces:
            await connection.send(piece)

    return serve


async def reset_after_request(connection: Connection) -> None:
    await connection.receive()
    connection.reset()


async def reset_immediately(connection: Connection) -> None:
    connection.reset()


async def redirect_to_self(connection: Connection) -> None:
    await connection.receive()
    await connection.send(http_response(b"", 307, Location=f"{connection.server.url}/api/submit_task"))


def reply_and_hold(*pieces: bytes, disconnected: asyncio.Event | None = None) -> Handler:
    """Read a request, send the pieces, and nothing more until the client disconnects, which sets `disconnected`."""

    async def serve(connection: Connection) -> None:
        await reply_and_close(*pieces)(connection)
        await connection.wait_closed()
        if disconnected:
            disconnected.set()

    return serve


never_reply = reply_and_hold()


@asynccontextmanager
async def run_server(
    serve: Handler, *, port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[ScriptedServer]:
    """Run a server on 127.0.0.1 that handles every connection alike; all are cut at the end."""
    peer = ScriptedServer()
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer.connections += 1
        try:
            with suppress(OSError):
                await serve(Connection(peer, reader, writer))
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(handle(reader, writer)))

    async with await asyncio.start_server(accept, "127.0.0.1", port, ssl=tls) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        peer.url = f"{'https' if tls else 'http'}://{address}"
        try:
            yield peer
        finally:  # before the server waits for its connections
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def unreachable_address(host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Yield an address where connections time out: the listener's queue is full."""
    with ExitStack() as sockets:
        listener = sockets.enter_context(socket.create_server((host, port), backlog=0))
        for _ in range(3):
            client = sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield f"http://{host}:{listener.getsockname()[1]}"
