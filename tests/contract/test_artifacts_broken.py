"""Results that break off, never end, or can't be reached."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from service.clients.artifacts import Outcome, Patience
from service.domain.errors import Overloaded, UpstreamInvalidResponse, UpstreamUnavailable
from service.usecases.ports import Asked, BrokenOff
from tests.contract.origin import (
    MOST,
    PICTURE,
    asked,
    chunked,
    fetcher,
    file,
    giving,
    giving_and_waiting,
    giving_part,
    head,
)
from tests.contract.peer import Connection, resetting_at_once, serving
from tests.support.descriptors import no_descriptors
from tests.support.valkey import free_port

CHUNKED = head(Transfer_Encoding="chunked")
IMPATIENT = Patience(first_byte=0.2, idle=0.2)


async def test_dead_address() -> None:
    """Where nobody listens, the reader is told to try again, and not where that is."""
    caller, port = fetcher(), free_port()
    with capture_logs() as logs, pytest.raises(UpstreamUnavailable) as caught:
        await caller.get(f"http://127.0.0.1:{port}/secret?signature=secret")
    assert caught.value.retry_after
    assert "127.0.0.1" not in str(caught.value)
    assert caller.outcome == Outcome.UNREACHABLE
    (line,) = logs
    assert (line["host"], line["error"]) == ("127.0.0.1", "ConnectError")
    assert "secret" not in str(logs)


async def test_no_descriptor() -> None:
    """For want of a descriptor the reader is asked to come again, and the upstream is not to blame."""
    caller = fetcher()
    async with serving(giving(file())) as peer:
        with no_descriptors(), pytest.raises(Overloaded) as caught:
            await caller.get(peer.url)
        assert caught.value.retry_after
        assert (await caller.get(peer.url))[1] == PICTURE


@pytest.mark.parametrize("url", ["http://two..dots/1.png", f"http://{'x' * 64}.example/1.png"])
async def test_unknown_host(url: str) -> None:
    """A name without an address can't be reached either."""
    with pytest.raises((UpstreamUnavailable, UpstreamInvalidResponse)):
        await fetcher().get(url)


@pytest.mark.parametrize("pieces", [(), (CHUNKED,), (head(Content_Length="9", Content_Type=""), b"12345678")])
async def test_slow_first_byte(pieces: tuple[bytes, ...]) -> None:
    """A server that does not come to the point is given up, and let go."""
    caller, left = fetcher(patience=IMPATIENT), asyncio.Event()
    async with serving(giving_and_waiting(*pieces, left=left)) as peer, asyncio.timeout(10):
        with pytest.raises(UpstreamUnavailable):
            await caller.get(peer.url)
        await left.wait()
    assert caller.outcome == Outcome.UNREACHABLE


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 x\r\nContent-",
        head(Content_Length="5"),
        head(Content_Length="-1"),
        CHUNKED + b"zz\r\n",
        file(b"cde", 206, Content_Range="bytes 2-5/10"),
    ],
)
async def test_broken_before_the_first_byte(answer: bytes) -> None:
    """A server that breaks off before the first byte gives nothing to pass on."""
    async with serving(giving(answer)) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await fetcher().get(peer.url, asked=Asked(range="bytes=2-5"))


async def test_reset() -> None:
    """A connection that is reset gives nothing to pass on."""
    async with serving(resetting_at_once) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await fetcher().get(peer.url)


@pytest.mark.parametrize(
    "pieces",
    [
        (head(Content_Length="1000"), PICTURE),
        (CHUNKED, chunked(PICTURE, end=False)),
        (CHUNKED, chunked(PICTURE, end=False), b"zz\r\n"),
        (head(206, Content_Range="bytes 0-9/10", Transfer_Encoding="chunked"), chunked(PICTURE[:8])),
        (head(206, Content_Range="bytes 0-9/10"), PICTURE[:8]),
    ],
    ids=["length", "chunked", "nonsense", "short part", "short part until the end of the connection"],
)
async def test_cut_off(pieces: tuple[bytes, ...]) -> None:
    """A result of which the end is missing is not taken for whole."""
    caller = fetcher()
    async with serving(giving(*pieces)) as peer:
        with pytest.raises(BrokenOff):
            await caller.get(peer.url, asked=Asked(range="bytes=0-"))
    assert caller.outcome == Outcome.BROKEN_OFF


async def test_idle() -> None:
    """A server that stops in the middle is given up, and let go."""
    caller, left = fetcher(patience=IMPATIENT), asyncio.Event()
    serve = giving_and_waiting(head(Content_Length="1000"), PICTURE, left=left)
    async with serving(serve) as peer, asyncio.timeout(10):
        with pytest.raises(BrokenOff):
            await caller.get(peer.url)
        await left.wait()


async def test_endless() -> None:
    """A result that does not end is broken off at the limit."""
    caller, left = fetcher(), asyncio.Event()

    async def serve(connection: Connection) -> None:
        await asked(connection)
        await connection.send(CHUNKED)
        try:
            while True:
                await connection.send(chunked(PICTURE * 100, end=False))
        except OSError:
            left.set()

    received = 0
    async with serving(serve) as peer, asyncio.timeout(30):
        with pytest.raises(BrokenOff):  # noqa: PT012 - what came before it counts
            async with caller.fetch(peer.url) as fetched:
                async for chunk in fetched.chunks:
                    received += len(chunk)
        await left.wait()
    assert MOST / 2 < received <= MOST


async def test_longer_part() -> None:
    """Of a part that goes on beyond its range nothing more is passed on."""
    answer = head(206, Content_Range="bytes 2-5/10", Transfer_Encoding="chunked")
    async with serving(giving_part(answer, chunked(b"cd", b"efgh"))) as peer:
        with pytest.raises(BrokenOff):
            await fetcher().get(peer.url, asked=Asked(range="bytes=2-5"))
    async with serving(giving(answer, chunked(b"cdefg"))) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await fetcher().get(peer.url, asked=Asked(range="bytes=2-5"))


async def test_two_lengths() -> None:
    """Where content comes in chunks, a length beside it is not passed on, for it means nothing."""
    async with serving(giving(head(Content_Length="3", Transfer_Encoding="chunked"), chunked(PICTURE))) as peer:
        fetched, found = await fetcher().get(peer.url)
    assert (fetched.length, found) == (None, PICTURE)
