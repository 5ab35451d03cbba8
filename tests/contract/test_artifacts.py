"""Artifacts are passed on unchanged, or not at all."""

from __future__ import annotations

import asyncio
import gzip

import pytest
from PIL import Image

from service.clients import artifacts
from service.clients.artifacts import FetchOutcome
from service.domain.errors import Overloaded, RangeNotSatisfiable, UpstreamInvalidResponse, UpstreamUnavailable
from service.domain.media import JPEG, PNG, SVG, WEBP
from service.domain.tasks import ArtifactName
from service.usecases.ports import Coverage, RangeRequest
from tests.contract import artifact_server
from tests.contract.artifact_server import (
    MAX_BYTES,
    PNG_IMAGE,
    chunked_body,
    file_response,
    make_fetcher,
    response_head,
    send_and_hold,
    send_pieces,
    send_range,
)
from tests.contract.scripted_server import Connection, run_server
from tests.support.images import encode_image

IMAGE, VECTOR, GRID = ArtifactName.IMAGE, ArtifactName.VECTOR, ArtifactName.GRID
LAST_MODIFIED = "Sat, 31 Jan 2026 12:00:00 GMT"


async def test_complete() -> None:
    """An artifact arrives complete, with its length and version, over a plain request."""
    content = PNG_IMAGE * 500
    caller = make_fetcher()
    answer = file_response(content, ETag='"v1"', Last_Modified=LAST_MODIFIED, Accept_Ranges="bytes", Set_Cookie="a=b")
    async with run_server(send_pieces(answer)) as peer:
        fetched, received = await caller.fetch_all(f"{peer.url}/files/1.png?signature=x%2Fy")
    assert received == content
    assert (fetched.name, fetched.coverage, fetched.media_type) == (IMAGE, Coverage.FULL, PNG)
    assert (fetched.length, fetched.content_range) == (len(content), None)
    assert (fetched.etag, fetched.last_modified, fetched.accept_ranges) == ('"v1"', LAST_MODIFIED, "bytes")
    assert caller.outcome == FetchOutcome.DONE
    ((head, _),) = peer.requests
    assert head.startswith(b"GET /files/1.png?signature=x%2Fy HTTP/1.1\r\n")
    assert b"\r\naccept-encoding: identity\r\n" in head.lower()
    assert not {b"range", b"if-range", b"if-none-match", b"if-modified-since", b"cookie", b"authorization"} & {
        line.partition(b":")[0].lower() for line in head.split(b"\r\n")
    }


@pytest.mark.parametrize(
    ("name", "declared", "content", "media_type"),
    [
        (IMAGE, "image/png", PNG_IMAGE, PNG),
        (VECTOR, "image/svg+xml; charset=utf-8", b"<svg/>", SVG),
        (VECTOR, "text/xml", artifact_server.SVG, SVG),
        (VECTOR, "image/svg+xml", b"<!--" + b" " * 30_000 + b"--><svg/>", SVG),
        (IMAGE, "application/octet-stream", PNG_IMAGE, PNG),
        *((IMAGE, label, PNG_IMAGE, PNG) for label in ("text/plain", "text/html", "image/jpeg", "image/x-png", "x")),
        (IMAGE, "binary/octet-stream", encode_image(Image.new("RGB", (4, 4)), "JPEG"), JPEG),
        (GRID, "", encode_image(Image.new("RGB", (4, 4)), "WEBP"), WEBP),
        (VECTOR, "", artifact_server.SVG, SVG),
    ],
)
async def test_types(name: ArtifactName, declared: str, content: bytes, media_type: str) -> None:
    """The type is that of the bytes, whatever the server claims and however small the first chunk is."""
    caller = make_fetcher()
    answer = response_head(Content_Type=declared, Transfer_Encoding="chunked")
    pieces = chunked_body(content[:1], content[1:2], content[2:])
    async with run_server(send_pieces(answer, pieces)) as peer:
        fetched, received = await caller.fetch_all(peer.url, name)
    assert (fetched.media_type, received, fetched.length) == (media_type, content, None)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        (IMAGE, file_response(b"<html></html>", Content_Type="text/html")),
        (IMAGE, file_response(b"<html></html>")),
        (IMAGE, file_response(b"<html></html>" + PNG_IMAGE * 1_000)),
        (IMAGE, file_response(b"<html></html>", Content_Type="application/octet-stream")),
        (IMAGE, file_response(b"<html></html>", Content_Type="")),
        (VECTOR, file_response(b"<!DOCTYPE html><svg/>", Content_Type="")),
        (IMAGE, file_response(artifact_server.SVG, Content_Type="image/svg+xml")),
        (IMAGE, file_response(artifact_server.SVG, Content_Type="")),
        (VECTOR, file_response(PNG_IMAGE)),
        (GRID, file_response(b"{}", Content_Type="application/json")),
        (IMAGE, file_response(b"")),
        (IMAGE, file_response(gzip.compress(PNG_IMAGE, mtime=0), Content_Encoding="gzip")),
        (IMAGE, file_response(b"\x0b\x02\x80" + PNG_IMAGE, Content_Encoding="br")),
        (IMAGE, file_response(b"400;chunk-signature=0a\r\n" + PNG_IMAGE, Content_Encoding="aws-chunked")),
    ],
)
async def test_wrong_type(name: ArtifactName, answer: bytes) -> None:
    """Content that is no image, or of the wrong kind, is not passed on."""
    caller = make_fetcher()
    async with run_server(send_pieces(answer)) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await caller.fetch_all(peer.url, name)
    assert caller.outcome == FetchOutcome.INVALID


@pytest.mark.parametrize("coding", ["aws-chunked", "utf-8", "none", "identity", "gzip", "br, x", ""])
async def test_codings_of_plain_bytes(coding: str) -> None:
    """A content coding declared for plain bytes is ignored."""
    async with run_server(send_pieces(file_response(Content_Encoding=coding))) as peer:
        _, content = await make_fetcher().fetch_all(peer.url)
    assert content == PNG_IMAGE


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 401, 403, 404, 410, 416, 418])
async def test_refused(status: int) -> None:
    """A server that lost the artifact, or violates HTTP, yields nothing."""
    async with run_server(send_pieces(file_response(PNG_IMAGE if status not in {204, 304} else b"", status))) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await make_fetcher().fetch_all(peer.url)


@pytest.mark.parametrize(
    ("status", "recent"),
    [(status, False) for status in (408, 425, 429, 500, 502, 503, 504)]
    + [(status, True) for status in (403, 404, 408, 425)],
)
async def test_temporary_errors(status: int, recent: bool) -> None:
    """Server errors, and a 404 for a result just finished, may be retried."""
    caller = make_fetcher()
    async with run_server(send_pieces(file_response(b"<html>", status))) as peer:
        with pytest.raises(UpstreamUnavailable) as caught:
            await caller.fetch_all(peer.url, recent=recent)
    assert caught.value.retry_after
    assert caller.outcome == FetchOutcome.UNREACHABLE


async def test_range() -> None:
    """A range is requested, and the part states its position."""
    caller = make_fetcher()
    answer = file_response(b"cdef", 206, Content_Range="bytes 2-5/10", ETag='"v1"')
    async with run_server(send_range(answer)) as peer:
        fetched, content = await caller.fetch_all(peer.url, requested=RangeRequest(range="bytes=2-5", if_range='"v1"'))
    assert (fetched.coverage, fetched.length, fetched.content_range, content) == (
        Coverage.PARTIAL,
        4,
        "bytes 2-5/10",
        b"cdef",
    )
    assert fetched.media_type == PNG
    head = peer.requests[0][0]
    assert b'\r\nrange: bytes=2-5\r\nif-range: "v1"\r\n' in head.lower()


async def test_type_of_a_part() -> None:
    """A middle part is preceded once by a fetch of the first bytes."""
    caller, requested = make_fetcher(), RangeRequest(range="bytes=2-5")
    answer = file_response(b"cdef", 206, Content_Range="bytes 2-5/10", ETag='"v1"')
    async with run_server(send_range(answer)) as peer:
        for _ in range(3):
            assert (await caller.fetch_all(peer.url, requested=requested))[0].media_type == PNG
        assert len(peer.requests) == 1 + 3
        assert b"if-range" not in peer.requests[1][0].lower()
    changed = file_response(b"cdef", 206, Content_Range="bytes 2-5/10", ETag='"v2"')
    async with run_server(send_range(changed), port=int(peer.url.rpartition(":")[2])) as peer:
        await caller.fetch_all(peer.url, requested=requested)
        assert len(peer.requests) == 2
    assert len(caller.client._types) == 2


async def test_type_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The type of a complete file is remembered for its parts, for a bounded number of files."""
    monkeypatch.setattr(artifacts, "MAX_CACHED_TYPES", 1)
    caller, requested = make_fetcher(), RangeRequest(range="bytes=2-")
    part = file_response(PNG_IMAGE[2:], 206, Content_Range=f"bytes 2-{len(PNG_IMAGE) - 1}/{len(PNG_IMAGE)}")
    first = iter([file_response(), part, file_response(), part, part])

    async def serve(connection: Connection) -> None:
        request = await artifact_server.read_request(connection)
        await connection.send(file_response() if "bytes=0-65535" in request else next(first))

    async with run_server(serve) as peer:
        await caller.fetch_all(f"{peer.url}/1")
        await caller.fetch_all(f"{peer.url}/1", requested=requested)
        assert len(peer.requests) == 2
        await caller.fetch_all(f"{peer.url}/2")
        await caller.fetch_all(f"{peer.url}/2", requested=requested)
        assert len(peer.requests) == 4
        await caller.fetch_all(f"{peer.url}/1", requested=requested)
        assert len(peer.requests) == 6


@pytest.mark.parametrize("content", [b"<html></html>", artifact_server.SVG, b""])
@pytest.mark.parametrize("content_range", ["bytes 0-3/10", "bytes 2-5/10", "bytes 2-5/*"])
async def test_part_of_wrong_type(content: bytes, content_range: str) -> None:
    """A part of a file that is no image is refused, each time."""
    caller = make_fetcher()
    async with run_server(
        send_range(file_response(b"<htm", 206, Content_Range=content_range), content=content)
    ) as peer:
        for _ in range(2):
            with pytest.raises(UpstreamInvalidResponse):
                await caller.fetch_all(peer.url, requested=RangeRequest(range="bytes=0-"))


async def test_short_first_part() -> None:
    """A part too short for its type is checked against more of the file."""
    for beginning, fits in ((PNG_IMAGE[:2], True), (b"<h", False)):
        answer = file_response(beginning, 206, Content_Range="bytes 0-1/10")
        async with run_server(send_range(answer)) as peer:
            reading = make_fetcher().fetch_all(peer.url, requested=RangeRequest(range="bytes=0-1"))
            if fits:
                assert (await reading)[1] == beginning
            else:
                with pytest.raises(UpstreamInvalidResponse):
                    await reading


@pytest.mark.parametrize(
    "content_range",
    [
        "",
        "bytes 2-4/10",
        "bytes 2-6/10",
        "bytes 5-2/10",
        "bytes */10",
        "bytes 2-5",
        "items 2-5/10",
        "bytes 2-5/9999999",
        "bytes 2-5/x",
    ],
)
async def test_wrong_ranges(content_range: str) -> None:
    """A part that does not match its range, has none, or is of too large a file is not passed on."""
    async with run_server(send_pieces(file_response(b"cdef", 206, Content_Range=content_range))) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await make_fetcher().fetch_all(peer.url, requested=RangeRequest(range="bytes=2-5"))


@pytest.mark.parametrize(("content_range", "passed_on"), [("bytes */10", "bytes */10"), ("", None), ("x", None)])
async def test_no_such_range(content_range: str, passed_on: str | None) -> None:
    """A range beyond the end is reported with the total size, if that is known."""
    caller = make_fetcher()
    async with run_server(send_pieces(file_response(b"", 416, Content_Range=content_range))) as peer:
        with pytest.raises(RangeNotSatisfiable) as caught:
            await caller.fetch_all(peer.url, requested=RangeRequest(range="bytes=20-"))
    assert caught.value.content_range == passed_on
    assert caller.outcome == FetchOutcome.DONE


@pytest.mark.parametrize(
    "requested", [RangeRequest(if_none_match='"v1"'), RangeRequest(if_modified_since=LAST_MODIFIED)]
)
async def test_not_modified(requested: RangeRequest) -> None:
    caller = make_fetcher()
    async with run_server(send_pieces(response_head(304, ETag='"v1"'))) as peer:
        fetched, content = await caller.fetch_all(peer.url, requested=requested)
    assert (fetched.coverage, fetched.etag, content) == (Coverage.NOT_MODIFIED, '"v1"', b"")
    assert caller.outcome == FetchOutcome.DONE


async def test_malformed_versions() -> None:
    async with run_server(
        send_pieces(file_response(ETag='"a\x01"', Last_Modified="a\tb", Accept_Ranges="none"))
    ) as peer:
        fetched, _ = await make_fetcher().fetch_all(peer.url)
    assert (fetched.etag, fetched.last_modified, fetched.accept_ranges) == (None, None, None)


async def test_announced_as_too_large() -> None:
    """An artifact announced as too large is refused without reading it."""
    caller, left = make_fetcher(), asyncio.Event()
    serve = send_and_hold(response_head(Content_Length=str(MAX_BYTES + 1)), PNG_IMAGE, disconnected=left)
    async with run_server(serve) as peer, asyncio.timeout(10):
        with pytest.raises(UpstreamInvalidResponse):
            await caller.fetch_all(peer.url)
        await left.wait()


async def test_disconnect() -> None:
    """Closing the stream ends the fetch and its connection."""
    caller, left = make_fetcher(), asyncio.Event()
    serve = send_and_hold(response_head(Content_Length="1000"), PNG_IMAGE, disconnected=left)
    async with run_server(serve) as peer, asyncio.timeout(10):
        async with caller.fetch(peer.url) as fetched:
            assert await anext(fetched.chunks) == PNG_IMAGE
        await left.wait()
    assert caller.outcome == FetchOutcome.CANCELLED


async def test_early_disconnect() -> None:
    """Closing before the first byte ends the fetch and its connection."""
    caller, left = make_fetcher(), asyncio.Event()
    async with run_server(send_and_hold(disconnected=left)) as peer, asyncio.timeout(10):
        reading = asyncio.create_task(caller.fetch_all(peer.url))
        await peer.request_received.wait()
        reading.cancel()
        await left.wait()
        with pytest.raises(asyncio.CancelledError):
            await reading
    assert caller.outcome == FetchOutcome.CANCELLED


async def test_too_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetches are bounded; each that ends admits another."""
    monkeypatch.setattr(artifacts, "MAX_CONCURRENT_FETCHES", 1)
    caller = make_fetcher()
    async with run_server(send_pieces(file_response())) as peer:
        async with caller.fetch(peer.url):
            with pytest.raises(Overloaded):
                await caller.fetch_all(peer.url)
        await caller.fetch_all(peer.url)
    assert caller.outcomes == [FetchOutcome.CANCELLED, FetchOutcome.DONE]
