"""Images at the URLs of tenants: no server is called that is not allowed, and none learns or costs more than it may."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from unittest.mock import AsyncMock
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from service.api.uploads import UploadReader
from service.clients.egress import Resolver, UnknownHost, resolve_host
from service.clients.images import MAX_REDIRECTS, ImageClient
from service.domain.errors import (
    GatewayError,
    ImageTooLarge,
    ImageUnreachable,
    InvalidImage,
    Overloaded,
    UnreachableReason,
    UnsupportedMediaType,
)
from service.domain.hosts import is_public
from service.domain.tenants import Tenant
from service.telemetry.metrics import ImageFetchOutcome, Metrics
from service.usecases.ports import Image
from tests.contract.scripted_server import (
    PNG_IMAGE,
    Connection,
    Handler,
    chunked_body,
    file_response,
    never_reply,
    reply_and_close,
    reply_and_hold,
    reset_after_request,
    reset_immediately,
    response_head,
    run_server,
    unreachable_address,
)
from tests.contract.test_egress import METADATA, PRIVATE
from tests.support.network import create_certificate, exhaust_descriptors, reserve_port

MAX_BYTES = 200_000
LOOPBACK = ip_address("127.0.0.1")
NO_CONNECTION, TIMEOUT, HTTP_STATUS, REDIRECT, INTERRUPTED = UnreachableReason
CHUNKED = response_head(Transfer_Encoding="chunked")


@dataclass
class Fetcher:
    """Fetches images as the gateway does, with the memory of uploads; `outcomes` are those of the metric."""

    resolver: Resolver = resolve_host
    tls: ssl.SSLContext | None = None
    seconds: float = 10
    metrics: Metrics = field(default_factory=lambda: Metrics(CollectorRegistry()))

    def __post_init__(self) -> None:
        self.uploads = UploadReader(max_image_bytes=MAX_BYTES, max_image_pixels=10_000, wait_seconds=0.05)
        self.client = ImageClient(self.metrics, seconds=self.seconds, resolver=self.resolver, tls=self.tls)

    async def fetch(self, url: str, *allowed: str) -> Image:
        """Fetch from a host whose port is allowed, on loopback unless other entries are."""
        try:
            async with self.open(url, *allowed) as image:
                assert self.uploads.memory.reserved_bytes["tenants",] == len(image.data)
                return image
        finally:
            assert self.uploads.memory.reserved_bytes["tenants",] == 0

    def open(self, url: str, *allowed: str) -> AbstractAsyncContextManager[Image]:
        allowed = allowed or (f"127.0.0.0/8:{urlsplit(url).port}",)
        opening = self.client.fetch(url, Tenant(1, "shop", (), allow_image_url=allowed))
        return self.uploads.fetch(opening, 1, has_digest=True)

    async def fail(self, url: str, *allowed: str) -> tuple[UnreachableReason, str]:
        """Return reason and detail of an ImageUnreachable."""
        with pytest.raises(ImageUnreachable) as caught:
            await self.fetch(url, *allowed)
        return caught.value.reason, caught.value.detail

    @property
    def outcomes(self) -> Mapping[str, float]:
        counts = {item.value: self.metrics.image_fetches.labels(item)._value.get() for item in ImageFetchOutcome}
        return {outcome: count for outcome, count in counts.items() if count}


def redirect_to(*locations: str) -> Handler:
    """Redirect to each location in turn, then send the image."""
    remaining = list(locations)

    async def serve(connection: Connection) -> None:
        await connection.receive()
        answer = response_head(302, Location=remaining.pop(0), Content_Length="0") if remaining else file_response()
        await connection.send(answer)

    return serve


async def test_image_is_fetched_once_with_a_plain_request() -> None:
    fetcher = Fetcher()
    with capture_logs() as logs:
        async with run_server(reply_and_close(file_response(Content_Type="text/html", Set_Cookie="a=b"))) as peer:
            image = await fetcher.fetch(f"{peer.url}/a%20b.png?signature=x%2Fy+z")
    assert (image.data, image.media_type, image.width) == (PNG_IMAGE, "image/png", 24)
    ((head, _),) = peer.requests
    assert head.startswith(b"GET /a%20b.png?signature=x%2Fy+z HTTP/1.1\r\n")
    names = {line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:] if line}
    assert names == {b"host", b"user-agent", b"accept", b"accept-encoding", b"connection"}
    assert fetcher.outcomes == {"done": 1}
    (log,) = [log for log in logs if log["event"] == "image.fetch_ended"]
    assert (log["host"], log["bytes"], log["tenant"]) == ("127.0.0.1", len(PNG_IMAGE), "shop")
    assert "signature" not in repr(logs)


@given(st.binary(max_size=50), st.lists(st.integers(1, 400), max_size=9), st.booleans())
async def test_any_division_into_chunks_is_the_same_image(tail: bytes, cuts: list[int], has_length: bool) -> None:
    content, start, pieces = PNG_IMAGE + tail, 0, []
    for size in cuts:
        pieces.append(content[start : start + size])
        start += size
    pieces = [piece for piece in (*pieces, content[start:]) if piece]
    head = response_head(Content_Length=str(len(content))) if has_length else CHUNKED
    async with run_server(reply_and_close(head, *(pieces if has_length else [chunked_body(*pieces)]))) as peer:
        assert (await Fetcher().fetch(peer.url)).data == content


# Server-side request forgery


@pytest.mark.parametrize("address", PRIVATE + METADATA)
async def test_an_address_that_is_not_public_looks_like_a_host_that_is_not_there(address: str) -> None:
    """An allowed name leads to it: the response is that of an unknown name, and no connection is tried."""
    fetcher = Fetcher(resolver=AsyncMock(return_value=[ip_address(address)]))
    unknown = Fetcher(resolver=AsyncMock(side_effect=UnknownHost("x")))
    refused = await fetcher.fail("http://images.test/a.png", "images.test")
    assert refused == await unknown.fail("http://images.test/a.png", "images.test")
    assert refused[0] is NO_CONNECTION
    assert fetcher.outcomes == unknown.outcomes == {"no-connection": 1}


async def test_a_closed_port_looks_the_same() -> None:
    closed = Fetcher(resolver=AsyncMock(return_value=[LOOPBACK]))
    unknown = Fetcher(resolver=AsyncMock(side_effect=UnknownHost("x")))
    with unreachable_address() as url:
        port = urlsplit(url).port
    listed = "images.test", f"images.test:{port}", f"127.0.0.0/8:{port}"
    assert await closed.fail(f"http://images.test:{port}/", *listed) == await unknown.fail(
        "http://images.test/", *listed
    )


async def test_metadata_services_are_not_called_whatever_is_allowed() -> None:
    for address in METADATA:
        fetcher = Fetcher(resolver=AsyncMock(return_value=[ip_address(address)]))
        assert (await fetcher.fail("http://images.test/", "images.test", "0.0.0.0/0", "::/0"))[0] is NO_CONNECTION


async def test_a_private_address_needs_a_network_with_the_port() -> None:
    async with run_server(reply_and_close(file_response())) as peer:
        port, fetcher = urlsplit(peer.url).port, Fetcher(resolver=AsyncMock(return_value=[LOOPBACK]))
        for allowed in ("127.0.0.1", "10.0.0.0/8:{port}", "127.0.0.0/8:1", "images.test:{port}"):
            name = f"http://images.test:{port}"
            assert (await fetcher.fail(name, f"images.test:{port}", allowed.format(port=port)))[0] is NO_CONNECTION
        assert peer.connections == 0
        await fetcher.fetch(f"http://images.test:{port}", f"images.test:{port}", f"127.0.0.0/8:{port}")


async def test_a_second_response_of_the_name_server_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the address that was checked is the one that is called, for each hop."""
    monkeypatch.setattr("service.clients.images.is_public", lambda ip: ip == LOOPBACK or is_public(ip))
    async with run_server(redirect_to("/again")) as peer:
        name, port = peer.url.replace("127.0.0.1", "images.test"), urlsplit(peer.url).port
        rebinding = AsyncMock(side_effect=[[LOOPBACK], [ip_address("10.0.0.1")]])
        fetcher = Fetcher(resolver=rebinding)
        assert (await fetcher.fail(name, f"images.test:{port}"))[0] is NO_CONNECTION
        assert (rebinding.await_count, peer.connections) == (2, 1)


@pytest.mark.parametrize(
    "location",
    [
        *("http://169.254.169.254/latest/", "http://[::ffff:127.0.0.1]/", "http://127.0.0.1:1/", "http://10.0.0.1/"),
        *("http://other.test/", "//other.test/", "http://user:pw@{host}/", "http://{host}\\@other.test/"),
        *("file:///etc/passwd", "data:image/png;base64,AAAA", "javascript:1", "http://[", "http://{host}:99999/"),
        "http://localhost:{port}/",
    ],
)
async def test_a_redirect_to_what_is_not_allowed_ends_it(location: str) -> None:
    fetcher = Fetcher()
    port = reserve_port()
    async with run_server(redirect_to(location.format(host=f"127.0.0.1:{port}", port=port)), port=port) as peer:
        assert (await fetcher.fail(peer.url))[0] is REDIRECT
    assert len(peer.requests) == 1
    assert fetcher.outcomes == {"redirect": 1}


async def test_redirects_among_allowed_hosts_are_followed_up_to_a_number() -> None:
    async with run_server(redirect_to(*["?next#top"] * MAX_REDIRECTS)) as peer:
        assert (await Fetcher().fetch(f"{peer.url}/a.png")).data == PNG_IMAGE
        assert peer.requests[-1][0].startswith(b"GET /a.png?next HTTP/1.1\r\n")
    for location in ("", "/again"):
        async with run_server(redirect_to(*[location] * 9)) as peer:
            assert (await Fetcher().fail(peer.url))[0] is REDIRECT
            assert len(peer.requests) == 1 + MAX_REDIRECTS


async def test_certificates_are_checked_and_no_redirect_leaves_https(tmp_path: Path) -> None:
    trusted, context = create_certificate(tmp_path)
    fetcher = Fetcher(tls=ssl.create_default_context(cafile=str(trusted)))
    async with run_server(reply_and_close(file_response())) as plain:
        ports = [f"127.0.0.0/8:{urlsplit(plain.url).port}"]
        async with run_server(redirect_to(plain.url), tls=context) as safe:
            ports.append(f"127.0.0.0/8:{urlsplit(safe.url).port}")
            assert (await fetcher.fail(safe.url, *ports))[0] is REDIRECT
            assert (await Fetcher().fail(safe.url, *ports))[0] is NO_CONNECTION  # an unknown authority
        assert plain.connections == 0
    async with run_server(reply_and_close(file_response()), tls=context) as safe:
        assert (await fetcher.fetch(safe.url)).data == PNG_IMAGE


# Hostile and broken servers


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        *((file_response(status=status), HTTP_STATUS) for status in (201, 204, 206, 300, 304, 401, 403, 404, 410, 500)),
        (b"", INTERRUPTED),
        (b"SSH-2.0-OpenSSH_9.2\r\n", INTERRUPTED),
        (response_head(Content_Length="1000") + PNG_IMAGE[:50], INTERRUPTED),
        (CHUNKED + chunked_body(PNG_IMAGE, end=False), INTERRUPTED),
        (CHUNKED + b"zz\r\n", INTERRUPTED),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 100_000, INTERRUPTED),
    ],
)
async def test_other_responses_and_torn_bodies(answer: bytes, reason: UnreachableReason) -> None:
    fetcher = Fetcher()
    async with run_server(reply_and_close(answer)) as peer:
        assert (await fetcher.fail(peer.url))[0] is reason
    assert fetcher.outcomes == {reason: 1}


@pytest.mark.parametrize("serve", [reset_immediately, reset_after_request])
async def test_broken_connections(serve: Handler) -> None:
    async with run_server(serve) as peer:
        assert (await Fetcher().fail(peer.url))[0] in {INTERRUPTED, NO_CONNECTION}


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([response_head(Content_Length=str(MAX_BYTES + 1))], ImageTooLarge),
        ([CHUNKED, chunked_body(PNG_IMAGE + bytes(MAX_BYTES), end=False)], ImageTooLarge),
        (
            [response_head(Content_Length="5", Transfer_Encoding="chunked"), chunked_body(bytes(99), end=False)],
            UnsupportedMediaType,
        ),
        ([response_head(Content_Length="1000"), b"GIF89a" + bytes(10)], UnsupportedMediaType),
        ([CHUNKED, chunked_body(b"<html><body>", end=False)], UnsupportedMediaType),
    ],
)
async def test_what_is_too_large_or_no_image_is_not_read_to_its_end(
    pieces: list[bytes], error: type[GatewayError]
) -> None:
    """The server sends nothing more, and does not close: the gateway does."""
    disconnected, fetcher = asyncio.Event(), Fetcher()
    async with run_server(reply_and_hold(*pieces, disconnected=disconnected)) as peer, asyncio.timeout(20):
        with pytest.raises(error):
            await fetcher.fetch(peer.url)
        await disconnected.wait()
    assert fetcher.outcomes == {"refused": 1}


@pytest.mark.parametrize("content", [b"", PNG_IMAGE[:-20], PNG_IMAGE[:10], b"short"])
async def test_a_damaged_image_is_refused_as_one_that_was_sent(content: bytes) -> None:
    async with run_server(reply_and_close(file_response(content))) as peer:
        with pytest.raises((InvalidImage, UnsupportedMediaType)):
            await Fetcher().fetch(peer.url)


@pytest.mark.parametrize(
    "pieces", [[], [b"HTTP/1.1 200"], [CHUNKED], [response_head(Content_Length="500"), PNG_IMAGE[:50]]]
)
async def test_a_slow_server_ends_at_the_time_limit(pieces: list[bytes]) -> None:
    disconnected, fetcher = asyncio.Event(), Fetcher(seconds=0.1)
    async with run_server(reply_and_hold(*pieces, disconnected=disconnected)) as peer, asyncio.timeout(20):
        assert (await fetcher.fail(peer.url))[0] is TIMEOUT
        await disconnected.wait()
    assert fetcher.outcomes == {"timeout": 1}


async def test_a_trickle_ends_at_the_time_limit() -> None:
    async def trickle(connection: Connection) -> None:
        await connection.receive()
        await connection.send(response_head(Content_Length="100000") + PNG_IMAGE[:20])
        with suppress(OSError):
            while True:
                await connection.send(b"x")
                await asyncio.sleep(0.01)

    async with run_server(trickle) as peer, asyncio.timeout(20):
        assert (await Fetcher(seconds=0.2).fail(peer.url))[0] is TIMEOUT


async def test_a_cancelled_fetch_ends_with_its_connection() -> None:
    disconnected, fetcher = asyncio.Event(), Fetcher()
    async with run_server(reply_and_hold(CHUNKED, disconnected=disconnected)) as peer, asyncio.timeout(20):
        fetching = asyncio.create_task(fetcher.fetch(peer.url))
        await peer.request_received.wait()
        fetching.cancel()
        await disconnected.wait()
        with pytest.raises(asyncio.CancelledError):
            await fetching
    assert fetcher.outcomes == {"cancelled": 1}


async def test_nothing_is_read_before_its_memory_is_granted() -> None:
    fetcher, disconnected = Fetcher(), asyncio.Event()
    memory = fetcher.uploads.memory
    held = memory.request(1, 64_000_000)
    async with run_server(reply_and_hold(file_response(), disconnected=disconnected)) as peer, asyncio.timeout(20):
        with pytest.raises(Overloaded):
            await fetcher.open(peer.url).__aenter__()
        await disconnected.wait()
    memory.shrink(held, 0)
    assert fetcher.outcomes == {"overloaded": 1}


async def test_a_machine_without_descriptors_is_not_the_fault_of_the_url() -> None:
    fetcher = Fetcher(resolver=AsyncMock(return_value=[LOOPBACK]))
    async with run_server(never_reply) as peer:
        with exhaust_descriptors(), pytest.raises(Overloaded):
            await fetcher.fetch(peer.url)
    assert fetcher.outcomes == {"overloaded": 1}
