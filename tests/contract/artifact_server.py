"""Artifact servers, good and bad, and a client that fetches from them."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from service.clients.artifacts import ArtifactClient
from service.domain.tasks import Artifact, ArtifactName
from service.domain.tenants import Account
from service.usecases.ports import ArtifactStream, RangeRequest
from tests.contract.client import ACCOUNT, CIPHER
from tests.contract.scripted_server import Connection, Handler
from tests.support.images import make_png

MAX_BYTES = 1_000_000
PNG_IMAGE = make_png()
SVG_IMAGE = b'<?xml version="1.0"?>\n<!-- made -->\n<svg xmlns="http://www.w3.org/2000/svg"/>'


def response_head(status: int = 200, **headers: str) -> bytes:
    """Return a response head, by default that of a PNG of unknown length."""
    fields = {"Content-Type": "image/png"} | {name.replace("_", "-"): text for name, text in headers.items()}
    lines = "".join(f"{name}: {text}\r\n" for name, text in fields.items() if text)
    return f"HTTP/1.1 {status} x\r\n{lines}\r\n".encode()


def file_response(content: bytes = PNG_IMAGE, status: int = 200, **headers: str) -> bytes:
    """Return a response with its length."""
    return response_head(status, **({"Content_Length": str(len(content))} | headers)) + content


def chunked_body(*chunks: bytes, end: bool = True) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + (b"0\r\n\r\n" if end else b"")


async def read_request(connection: Connection) -> str:
    """Read one request without a body; returns its head."""
    head = await connection.reader.readuntil(b"\r\n\r\n")
    connection.server.requests.append((head, b""))
    connection.server.request_received.set()
    return head.decode()


def send_pieces(*pieces: bytes) -> Handler:
    """Send the pieces to each client, then close."""

    async def serve(connection: Connection) -> None:
        await read_request(connection)
        for piece in pieces:
            await connection.send(piece)

    return serve


def send_and_hold(*pieces: bytes, disconnected: asyncio.Event | None = None) -> Handler:
    """Send the pieces, then nothing until the client disconnects, which sets `disconnected`."""

    async def serve(connection: Connection) -> None:
        await send_pieces(*pieces)(connection)
        await connection.wait_closed()
        if disconnected:
            disconnected.set()

    return serve


def send_range(*pieces: bytes, content: bytes = PNG_IMAGE) -> Handler:
    """Send the pieces to a range request for `content`, and the real first bytes to a request for those."""

    async def serve(connection: Connection) -> None:
        request = await read_request(connection)
        if "bytes=0-65535" in request:
            size = len(content)
            await connection.send(
                file_response(content, 206, Content_Type="", Content_Range=f"bytes 0-{size - 1}/{size}")
            )
            return
        for piece in pieces:
            await connection.send(piece)

    return serve


@dataclass
class Fetcher:
    """A client, and the outcomes that it reported."""

    client: ArtifactClient
    outcomes: list[StrEnum] = field(default_factory=list)

    def fetch(
        self,
        url: str,
        name: ArtifactName = ArtifactName.IMAGE,
        *,
        account: Account | None = ACCOUNT,
        requested: RangeRequest | None = None,
        recent: bool = False,
    ) -> AbstractAsyncContextManager[ArtifactStream]:
        return self.client.fetch(account, Artifact(name, url), requested or RangeRequest(), is_recent=recent)

    async def fetch_all(
        self, url: str, name: ArtifactName = ArtifactName.IMAGE, **options: Any
    ) -> tuple[ArtifactStream, bytes]:
        async with self.fetch(url, name, **options) as fetched:
            return fetched, b"".join([chunk async for chunk in fetched.chunks])

    @property
    def outcome(self) -> StrEnum:
        (outcome,) = self.outcomes
        return outcome


def make_fetcher(upstream_url: str = "http://127.0.0.1", **options: Any) -> Fetcher:
    """Return a client whose upstream is on localhost."""
    outcomes: list[StrEnum] = []

    def observe(_operation: StrEnum, outcome: StrEnum, _seconds: float) -> None:
        outcomes.append(outcome)

    client = ArtifactClient(upstream_url, max_bytes=MAX_BYTES, on_call=observe, user_keys=CIPHER, **options)
    return Fetcher(client, outcomes)
