"""Artifacts are passed on unchanged, or not at all."""

from __future__ import annotations

import asyncio
import gzip
import logging

import pytest
from PIL import Image
from structlog.testing import capture_logs

from service.clients import artifacts
from service.clients.artifacts import FetchOutcome, FetchTimeouts
from service.domain.errors import GatewayError, UpstreamInvalidResponse, UpstreamUnavailable
from service.domain.media import JPEG, PNG, SVG, WEBP
from service.domain.tasks import ArtifactName
from service.usecases.ports import Coverage, RangeRequest, TransferAborted
from tests.contract.client import MAX_BYTES, make_fetcher
from tests.contract.scripted_server import (
    PNG_IMAGE,
    Connection,
    Handler,
    chunked_body,
    file_response,
    reply_and_close,
    reply_and_hold,
    response_head,
    run_server,
)
from tests.support.images import encode_image
from tests.support.network import reserve_port

pytestmark = pytest.mark.usefixtures("public_loopback")
IMAGE, VECTOR, GRID = ArtifactName.IMAGE, ArtifactName.VECTOR, ArtifactName.GRID
LAST_MODIFIED = "Sat, 31 Jan 2026 12:00:00 GMT"
CHUNKED = response_head(Transfer_Encoding="chunked")
CHUNKED_PART = response_head(206, Content_Range="bytes 2-5/10", Transfer_Encoding="chunked")
PART = RangeRequest(range="bytes=2-5")
SVG_IMAGE = b'<?xml version="1.0"?>\n<!-- made -->\n<svg xmlns="http://www.w3.org/2000/svg"/>'


def send_range(*pieces: bytes, content: bytes = PNG_IMAGE) -> Handler:
    """Send the pieces to a range request for `content`, and the real first bytes to a request for those."""
    first = file_response(content, 206, Content_Type="", Content_Range=f"bytes 0-{len(content) - 1}/{len(content)}")

    async def serve(connection: Connection) -> None:
        is_first = "bytes=0-65535" in await connection.receive()
        for piece in (first,) if is_first else pieces:
            await connection.send(piece)

    return serve


async def test_artifact_arrives_complete_with_its_length_and_version() -> None:
    content = PNG_IMAGE * 500
    caller = make_fetcher()
    answer = file_response(content, ETag='"v1"', Last_Modified=LAST_MODIFIED, Accept_Ranges="bytes")
    async with run_server(reply_and_close(answer)) as peer:
        fetched, received = await caller.fetch_all(f"{peer.url}/files/1.png?signature=x%2Fy")
    assert received == content
    assert (fetched.name, fetched.coverage, fetched.media_type) == (IMAGE, Coverage.FULL, PNG)
    assert (fetched.length, fetched.content_range) == (len(content), None)
    assert (fetched.etag, fetched.last_modified, fetched.accept_ranges) == ('"v1"', LAST_MODIFIED, "bytes")
    assert caller.outcomes == [FetchOutcome.DONE]
    ((head, _),) = peer.requests
    assert head.startswith(b"GET /files/1.png?signature=x%2Fy HTTP/1.1\r\n")
    names = {line.partition(b":")[0].lower() for line in head.split(b"\r\n")}
    assert not {b"range", b"if-range", b"if-none-match", b"if-modified-since", b"traceparent"} & names


@pytest.mark.parametrize(
    ("name", "declared", "content", "media_type"),
    [
        (VECTOR, "image/svg+xml; charset=utf-8", b"<svg/>", SVG),
        (VECTOR, "", SVG_IMAGE, SVG),
        (VECTOR, "image/svg+xml", b"<!--" + b" " * 30_000 + b"--><svg/>", SVG),
        (IMAGE, "text/html", PNG_IMAGE, PNG),
        (IMAGE, "binary/octet-stream", encode_image(Image.new("RGB", (4, 4)), "JPEG"), JPEG),
        (GRID, "", encode_image(Image.new("RGB", (4, 4)), "WEBP"), WEBP),
    ],
)
async def test_types(name: ArtifactName, declared: str, content: bytes, media_type: str) -> None:
    """The type is that of the bytes, whatever the server claims and however small the first chunk is."""
    answer = response_head(Content_Type=declared, Content_Length="3", Transfer_Encoding="chunked")
    async with run_server(reply_and_close(answer, chunked_body(content[:1], content[1:2], content[2:]))) as peer:
        fetched, received = await make_fetcher().fetch_all(peer.url, name)
    assert (fetched.media_type, received, fetched.length) == (media_type, content, None)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        (IMAGE, file_response(b"<html></html>")),
        (VECTOR, file_response(b"<!DOCTYPE html><svg/>", Content_Type="image/svg+xml")),
        (IMAGE, file_response(SVG_IMAGE, Content_Type="image/svg+xml")),
        (VECTOR, file_response(PNG_IMAGE)),
        (IMAGE, file_response(b"")),
        (IMAGE, file_response(gzip.compress(PNG_IMAGE, mtime=0), Content_Encoding="gzip")),
        (IMAGE, file_response(b"400;chunk-signature=0a\r\n" + PNG_IMAGE, Content_Encoding="aws-chunked")),
        (IMAGE, response_head(Content_Length=str(MAX_BYTES + 1)) + PNG_IMAGE),
        (IMAGE, response_head(Content_Length="5")),
        (IMAGE, CHUNKED + b"zz\r\n"),
        *((IMAGE, file_response(PNG_IMAGE, status)) for status in (201, 206, 300, 403, 404, 416)),
        (IMAGE, file_response(b"", 304)),
    ],
)
async def test_wrong_content(name: ArtifactName, answer: bytes) -> None:
    caller = make_fetcher()
    async with run_server(reply_and_close(answer)) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await caller.fetch_all(peer.url, name)
    assert caller.outcomes == [FetchOutcome.INVALID]


@pytest.mark.parametrize("coding", ["aws-chunked", "gzip", "br, x"])
async def test_falsely_declared_codings_and_malformed_versions_are_ignored(coding: str) -> None:
    answer = file_response(Content_Encoding=coding, ETag='"a\x01"', Last_Modified="a\tb", Accept_Ranges="none")
    async with run_server(reply_and_close(answer)) as peer:
        fetched, content = await make_fetcher().fetch_all(peer.url)
    assert content == PNG_IMAGE
    assert (fetched.etag, fetched.last_modified, fetched.accept_ranges) == (None, None, None)


@pytest.mark.parametrize(
    ("status", "recent"),
    [(408, False), (425, False), (429, False), (500, False), (504, False), (403, True), (404, True)],
)
async def test_server_errors_and_a_404_of_a_recent_result_may_be_retried(status: int, recent: bool) -> None:
    caller = make_fetcher()
    async with run_server(reply_and_close(file_response(b"<html>", status))) as peer:
        with pytest.raises(UpstreamUnavailable) as caught:
            await caller.fetch_all(peer.url, recent=recent)
    assert caught.value.retry_after
    assert caller.outcomes == [FetchOutcome.UNREACHABLE]


async def test_part_is_preceded_once_per_version_by_a_fetch_of_the_first_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "MAX_CACHED_TYPES", 1)
    caller, requested = make_fetcher(), RangeRequest(range="bytes=2-5", if_range='"v1"')
    port = reserve_port()
    for version in ("v1", "v2", "v1"):
        answer = file_response(b"cdef", 206, Content_Range="bytes 2-5/10", ETag=f'"{version}"')
        async with run_server(send_range(answer), port=port) as peer:
            for _ in range(2):
                fetched, content = await caller.fetch_all(peer.url, requested=requested)
                assert (fetched.coverage, fetched.media_type, content) == (Coverage.PARTIAL, PNG, b"cdef")
                assert (fetched.length, fetched.content_range) == (4, "bytes 2-5/10")
        assert len(peer.requests) == 1 + 2
        assert b'\r\nrange: bytes=2-5\r\nif-range: "v1"\r\n' in peer.requests[0][0].lower()
        assert b"if-range" not in peer.requests[1][0].lower()


async def test_type_of_a_complete_file_is_remembered_for_its_parts() -> None:
    caller = make_fetcher()
    part = file_response(PNG_IMAGE[2:], 206, Content_Range=f"bytes 2-{len(PNG_IMAGE) - 1}/{len(PNG_IMAGE)}")

    async def serve(connection: Connection) -> None:
        await connection.send(part if "bytes=2-" in await connection.receive() else file_response())

    async with run_server(serve) as peer:
        await caller.fetch_all(peer.url)
        await caller.fetch_all(peer.url, requested=RangeRequest(range="bytes=2-"))
        assert len(peer.requests) == 2


@pytest.mark.parametrize(
    ("part", "content_range", "content"),
    [
        (b"<htm", "bytes 0-3/10", b"<html></html>"),
        (b"<htm", "bytes 2-5/*", SVG_IMAGE),
        (b"<htm", "bytes 2-5/10", b""),
        (b"<h", "bytes 0-1/10", PNG_IMAGE),  # too short for a type
    ],
)
async def test_part_of_a_file_that_is_no_image_is_refused_each_time(
    part: bytes, content_range: str, content: bytes
) -> None:
    caller = make_fetcher()
    async with run_server(send_range(file_response(part, 206, Content_Range=content_range), content=content)) as peer:
        for _ in range(2):
            with pytest.raises(UpstreamInvalidResponse):
                await caller.fetch_all(peer.url, requested=RangeRequest(range="bytes=0-"))


async def test_part_too_short_for_its_type_is_checked_against_more_of_the_file() -> None:
    async with run_server(send_range(file_response(PNG_IMAGE[:2], 206, Content_Range="bytes 0-1/10"))) as peer:
        assert (await make_fetcher().fetch_all(peer.url, requested=RangeRequest(range="bytes=0-1")))[1] == PNG_IMAGE[:2]


@pytest.mark.parametrize(
    ("content", "content_range"),
    [
        *((b"cdef", text) for text in ("", "bytes 2-4/10", "bytes 5-2/10", "bytes */10", "items 2-5/10")),
        (b"cdef", "bytes 2-5/9999999"),
        (b"cde", "bytes 2-5/10"),
    ],
)
async def test_wrong_ranges(content: bytes, content_range: str) -> None:
    async with run_server(reply_and_close(file_response(content, 206, Content_Range=content_range))) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await make_fetcher().fetch_all(peer.url, requested=PART)


@pytest.mark.parametrize(
    ("error", "pieces"),
    [
        (TransferAborted, (response_head(Content_Length="1000"), PNG_IMAGE)),
        (TransferAborted, (CHUNKED, chunked_body(PNG_IMAGE, end=False))),
        (TransferAborted, (CHUNKED_PART, chunked_body(b"cd", b"efgh"))),
        (UpstreamInvalidResponse, (CHUNKED_PART, chunked_body(b"cdefg"))),
    ],
)
async def test_wrong_length(error: type[Exception], pieces: tuple[bytes, ...]) -> None:
    caller = make_fetcher()
    async with run_server(send_range(*pieces)) as peer:
        with pytest.raises(error):
            await caller.fetch_all(peer.url, requested=RangeRequest(range="bytes=0-9"))
    assert caller.outcomes == [(FetchOutcome.ABORTED if error is TransferAborted else FetchOutcome.INVALID)]


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((CHUNKED,), UpstreamUnavailable),
        ((response_head(Content_Length="9", Content_Type=""), b"12345678"), UpstreamUnavailable),
        ((response_head(Content_Length="1000"), PNG_IMAGE), TransferAborted),
        ((response_head(Content_Length=str(MAX_BYTES + 1)), PNG_IMAGE), UpstreamInvalidResponse),
    ],
)
async def test_stalled_fetch_ends_with_its_connection(pieces: tuple[bytes, ...], error: type[Exception]) -> None:
    disconnected = asyncio.Event()
    caller = make_fetcher(timeouts=FetchTimeouts(first_byte_seconds=0.1, idle_seconds=0.1))
    async with run_server(reply_and_hold(*pieces, disconnected=disconnected)) as peer, asyncio.timeout(20):
        with pytest.raises(error):
            await caller.fetch_all(peer.url)
        await disconnected.wait()


async def test_fetch_that_is_cancelled_before_the_first_byte_ends_with_its_connection() -> None:
    caller, disconnected = make_fetcher(), asyncio.Event()
    async with run_server(reply_and_hold(disconnected=disconnected)) as peer, asyncio.timeout(20):
        fetching = asyncio.create_task(caller.fetch_all(peer.url))
        await peer.request_received.wait()
        fetching.cancel()
        await disconnected.wait()
        with pytest.raises(asyncio.CancelledError):
            await fetching
    assert caller.outcomes == [FetchOutcome.CANCELLED]


async def test_endless_artifact_is_cut_off_at_the_size_limit() -> None:
    caller, disconnected, received = make_fetcher(), asyncio.Event(), 0

    async def serve(connection: Connection) -> None:
        await connection.receive()
        await connection.send(CHUNKED)
        try:
            while True:
                await connection.send(chunked_body(PNG_IMAGE * 100, end=False))
        except OSError:
            disconnected.set()

    async with run_server(serve) as peer, asyncio.timeout(30):
        with pytest.raises(TransferAborted):  # noqa: PT012 - what came before it counts
            async with caller.fetch(peer.url) as fetched:
                async for chunk in fetched.chunks:
                    received += len(chunk)
        await disconnected.wait()
    assert MAX_BYTES / 2 < received <= MAX_BYTES


async def test_failures_are_logged_by_host(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with capture_logs() as logs, pytest.raises(GatewayError):
        await make_fetcher().fetch_all(f"http://127.0.0.1:{reserve_port()}/secret?signature=secret")
    (line,) = logs
    assert (line["host"], line["error"]) == ("127.0.0.1", "ConnectError")
    assert "secret" not in f"{logs} {caplog.text}"
