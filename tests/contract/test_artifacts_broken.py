"""Artifacts that are cut off, never end, or cannot be fetched."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from service.clients.artifacts import FetchOutcome, FetchTimeouts
from service.domain.errors import Overloaded, UpstreamInvalidResponse, UpstreamUnavailable
from service.usecases.ports import RangeRequest, TransferAborted
from tests.contract.artifact_server import (
    MAX_BYTES,
    PNG_IMAGE,
    chunked_body,
    file_response,
    make_fetcher,
    read_request,
    response_head,
    send_and_hold,
    send_pieces,
    send_range,
)
from tests.contract.scripted_server import Connection, reset_immediately, run_server
from tests.support.file_descriptors import exhaust_descriptors
from tests.support.valkey import reserve_port

CHUNKED = response_head(Transfer_Encoding="chunked")
SHORT_TIMEOUTS = FetchTimeouts(first_byte_seconds=0.2, idle_seconds=0.2)


async def test_dead_address() -> None:
    """A refused connection may be retried; the error does not show the address."""
    caller, port = make_fetcher(), reserve_port()
    with capture_logs() as logs, pytest.raises(UpstreamUnavailable) as caught:
        await caller.fetch_all(f"http://127.0.0.1:{port}/secret?signature=secret")
    assert caught.value.retry_after
    assert "127.0.0.1" not in str(caught.value)
    assert caller.outcome == FetchOutcome.UNREACHABLE
    (line,) = logs
    assert (line["host"], line["error"]) == ("127.0.0.1", "ConnectError")
    assert "secret" not in str(logs)


async def test_no_descriptor() -> None:
    """Without a file descriptor the client is asked to retry, and the upstream is not blamed."""
    caller = make_fetcher()
    async with run_server(send_pieces(file_response())) as peer:
        with exhaust_descriptors(), pytest.raises(Overloaded) as caught:
            await caller.fetch_all(peer.url)
        assert caught.value.retry_after
        assert (await caller.fetch_all(peer.url))[1] == PNG_IMAGE


@pytest.mark.parametrize("url", ["http://two..dots/1.png", f"http://{'x' * 64}.example/1.png"])
async def test_unknown_host(url: str) -> None:
    with pytest.raises((UpstreamUnavailable, UpstreamInvalidResponse)):
        await make_fetcher().fetch_all(url)


@pytest.mark.parametrize("pieces", [(), (CHUNKED,), (response_head(Content_Length="9", Content_Type=""), b"12345678")])
async def test_slow_first_byte(pieces: tuple[bytes, ...]) -> None:
    """The fetch times out without a first byte."""
    caller, left = make_fetcher(timeouts=SHORT_TIMEOUTS), asyncio.Event()
    async with run_server(send_and_hold(*pieces, disconnected=left)) as peer, asyncio.timeout(10):
        with pytest.raises(UpstreamUnavailable):
            await caller.fetch_all(peer.url)
        await left.wait()
    assert caller.outcome == FetchOutcome.UNREACHABLE


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 x\r\nContent-",
        response_head(Content_Length="5"),
        response_head(Content_Length="-1"),
        CHUNKED + b"zz\r\n",
        file_response(b"cde", 206, Content_Range="bytes 2-5/10"),
    ],
)
async def test_broken_before_the_first_byte(answer: bytes) -> None:
    async with run_server(send_pieces(answer)) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await make_fetcher().fetch_all(peer.url, requested=RangeRequest(range="bytes=2-5"))


async def test_reset() -> None:
    async with run_server(reset_immediately) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await make_fetcher().fetch_all(peer.url)


@pytest.mark.parametrize(
    "pieces",
    [
        (response_head(Content_Length="1000"), PNG_IMAGE),
        (CHUNKED, chunked_body(PNG_IMAGE, end=False)),
        (CHUNKED, chunked_body(PNG_IMAGE, end=False), b"zz\r\n"),
        (response_head(206, Content_Range="bytes 0-9/10", Transfer_Encoding="chunked"), chunked_body(PNG_IMAGE[:8])),
        (response_head(206, Content_Range="bytes 0-9/10"), PNG_IMAGE[:8]),
    ],
    ids=["length", "chunked", "nonsense", "short part", "short part until the end of the connection"],
)
async def test_cut_off(pieces: tuple[bytes, ...]) -> None:
    """A truncated artifact is reported as such."""
    caller = make_fetcher()
    async with run_server(send_pieces(*pieces)) as peer:
        with pytest.raises(TransferAborted):
            await caller.fetch_all(peer.url, requested=RangeRequest(range="bytes=0-"))
    assert caller.outcome == FetchOutcome.ABORTED


async def test_idle() -> None:
    """A fetch that stalls in the middle times out."""
    caller, left = make_fetcher(timeouts=SHORT_TIMEOUTS), asyncio.Event()
    serve = send_and_hold(response_head(Content_Length="1000"), PNG_IMAGE, disconnected=left)
    async with run_server(serve) as peer, asyncio.timeout(10):
        with pytest.raises(TransferAborted):
            await caller.fetch_all(peer.url)
        await left.wait()


async def test_endless() -> None:
    """An endless artifact is cut off at the size limit."""
    caller, left = make_fetcher(), asyncio.Event()

    async def serve(connection: Connection) -> None:
        await read_request(connection)
        await connection.send(CHUNKED)
        try:
            while True:
                await connection.send(chunked_body(PNG_IMAGE * 100, end=False))
        except OSError:
            left.set()

    received = 0
    async with run_server(serve) as peer, asyncio.timeout(30):
        with pytest.raises(TransferAborted):  # noqa: PT012 - what came before it counts
            async with caller.fetch(peer.url) as fetched:
                async for chunk in fetched.chunks:
                    received += len(chunk)
        await left.wait()
    assert MAX_BYTES / 2 < received <= MAX_BYTES


async def test_longer_part() -> None:
    """Bytes beyond the requested range are not passed on."""
    answer = response_head(206, Content_Range="bytes 2-5/10", Transfer_Encoding="chunked")
    async with run_server(send_range(answer, chunked_body(b"cd", b"efgh"))) as peer:
        with pytest.raises(TransferAborted):
            await make_fetcher().fetch_all(peer.url, requested=RangeRequest(range="bytes=2-5"))
    async with run_server(send_pieces(answer, chunked_body(b"cdefg"))) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await make_fetcher().fetch_all(peer.url, requested=RangeRequest(range="bytes=2-5"))


async def test_two_lengths() -> None:
    """With chunked transfer, a Content-Length is not passed on."""
    async with run_server(
        send_pieces(response_head(Content_Length="3", Transfer_Encoding="chunked"), chunked_body(PNG_IMAGE))
    ) as peer:
        fetched, content = await make_fetcher().fetch_all(peer.url)
    assert (fetched.length, content) == (None, PNG_IMAGE)
