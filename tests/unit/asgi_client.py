"""Calls of an application, by ASGI messages or on raw connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import AsyncMock

import msgspec
from msgspec import Struct

Message = MutableMapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]


class AsgiResponse(Struct):
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


def make_http_scope(method: str = "GET", path: str = "/", headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    target, _, query = path.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": target,
        "raw_path": target.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
        "client": ("127.0.0.1", 50_000),
        "server": ("127.0.0.1", 8080),
    }


def make_body_messages(chunks: Iterable[bytes]) -> list[Message]:
    """Make the messages of a body; the last one ends it, as `more_body` is false by default."""
    messages: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    return [*messages, {"type": "http.request", "body": b""}]


def make_receive(messages: Iterable[Message], *, stay_open: bool = False) -> Any:
    """Make an ASGI `receive` that returns these messages, then disconnects or blocks."""
    remaining = iter(messages)

    async def receive() -> Message:
        for message in remaining:
            return message
        if stay_open:
            await asyncio.get_running_loop().create_future()
        return {"type": "http.disconnect"}

    return receive


async def call_app(
    app: App, method: str = "GET", path: str = "/", headers: Mapping[str, str] | None = None
) -> AsgiResponse | None:
    """Send one request without a body; return None without a response."""
    send = AsyncMock()
    await app(make_http_scope(method, path, headers), make_receive(make_body_messages([])), send)
    if not send.await_count:
        return None
    start, *rest = (call.args[0] for call in send.await_args_list)
    return AsgiResponse(
        start["status"],
        {name.decode().lower(): value.decode() for name, value in start["headers"]},
        b"".join(message.get("body", b"") for message in rest),
    )


@asynccontextmanager
async def open_raw_connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_response(reader: asyncio.StreamReader) -> AsgiResponse:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers["content-length"]))
    return AsgiResponse(int(head[0].split()[1]), headers, body)
