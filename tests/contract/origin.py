"""Servers of results, good and bad, and a client that fetches from them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache

import httpx2

from service.clients.artifacts import ArtifactClient, Patience
from service.clients.egress import Resolver, resolve
from service.domain.tasks import Artifact, ArtifactName
from service.domain.tenants import Account
from service.usecases.ports import Asked, Fetched
from tests.contract.client import ACCOUNT, SEALER
from tests.contract.peer import Connection, Serve
from tests.support.images import png

MOST = 1_000_000
PICTURE = png()
SVG = b'<?xml version="1.0"?>\n<!-- made -->\n<svg xmlns="http://www.w3.org/2000/svg"/>'


def head(status: int = 200, **headers: str) -> bytes:
    """The head of an answer; without other words a PNG of unknown length."""
    fields = {"Content-Type": "image/png"} | {name.replace("_", "-"): text for name, text in headers.items()}
    lines = "".join(f"{name}: {text}\r\n" for name, text in fields.items() if text)
    return f"HTTP/1.1 {status} x\r\n{lines}\r\n".encode()


def file(content: bytes = PICTURE, status: int = 200, **headers: str) -> bytes:
    """An answer with its length."""
    return head(status, **({"Content_Length": str(len(content))} | headers)) + content


def chunked(*pieces: bytes, end: bool = True) -> bytes:
    """Content in chunks."""
    return b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in pieces) + (b"0\r\n\r\n" if end else b"")


async def asked(connection: Connection) -> str:
    """Read one request without content; its head."""
    found = await connection.reader.readuntil(b"\r\n\r\n")
    connection.peer.requests.append((found, b""))
    connection.peer.arrived.set()
    return found.decode()


def giving(*pieces: bytes) -> Serve:
    """Send the pieces to each who asks, and close."""

    async def serve(connection: Connection) -> None:
        await asked(connection)
        for piece in pieces:
            await connection.send(piece)

    return serve


def giving_and_waiting(*pieces: bytes, left: asyncio.Event | None = None) -> Serve:
    """Send the pieces, and then nothing until the client goes, which `left` tells."""

    async def serve(connection: Connection) -> None:
        await asked(connection)
        for piece in pieces:
            await connection.send(piece)
        await connection.wait_for_the_end()
        if left:
            left.set()

    return serve


def giving_part(*pieces: bytes, content: bytes = PICTURE) -> Serve:
    """Send the pieces to a request for a part of `content`, and its beginning to a request for that."""

    async def serve(connection: Connection) -> None:
        request = await asked(connection)
        if "bytes=0-65535" in request:
            size = len(content)
            await connection.send(file(content, 206, Content_Type="", Content_Range=f"bytes 0-{size - 1}/{size}"))
            return
        for piece in pieces:
            await connection.send(piece)

    return serve


@dataclass
class Fetcher:
    """A client, and what it told its observer."""

    client: ArtifactClient
    outcomes: list[StrEnum] = field(default_factory=list)

    @asynccontextmanager
    async def fetch(
        self,
        url: str,
        name: ArtifactName = ArtifactName.IMAGE,
        *,
        account: Account | None = ACCOUNT,
        asked: Asked | None = None,
        recent: bool = False,
    ) -> AsyncIterator[Fetched]:
        """Fetch a result within the block."""
        async with self.client.fetch(account, Artifact(name, url), asked or Asked(), recent=recent) as fetched:
            yield fetched

    async def get(
        self,
        url: str,
        name: ArtifactName = ArtifactName.IMAGE,
        *,
        asked: Asked | None = None,
        recent: bool = False,
    ) -> tuple[Fetched, bytes]:
        """Fetch a result to its end."""
        async with self.fetch(url, name, asked=asked, recent=recent) as fetched:
            return fetched, b"".join([chunk async for chunk in fetched.chunks])

    @property
    def outcome(self) -> StrEnum:
        """What became of the only fetch."""
        (outcome,) = self.outcomes
        return outcome


@cache
def _trust() -> ssl.SSLContext:
    """Made once, since it takes a while."""
    return httpx2.create_ssl_context()


def fetcher(
    upstream_url: str = "http://127.0.0.1",
    *,
    resolver: Resolver = resolve,
    patience: Patience | None = None,
    tls: ssl.SSLContext | None = None,
) -> Fetcher:
    """A client whose upstream is this machine."""
    outcomes: list[StrEnum] = []

    def observe(operation: StrEnum, outcome: StrEnum, seconds: float) -> None:
        assert operation == "fetch"
        assert 0 <= seconds < 60
        outcomes.append(outcome)

    client = ArtifactClient(
        upstream_url,
        max_bytes=MOST,
        observe=observe,
        user_keys=SEALER,
        tls=tls or _trust(),
        resolver=resolver,
        patience=patience,
    )
    return Fetcher(client, outcomes)
