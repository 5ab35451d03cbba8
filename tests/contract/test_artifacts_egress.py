"""Artifacts are fetched only from allowed addresses, whatever the upstream and its servers answer."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path

import pytest

from service.clients import artifacts
from service.clients.artifacts import MAX_REDIRECTS, FetchOutcome
from service.clients.egress import IpAddress, Resolver, UnknownHost
from service.domain.errors import UpstreamInvalidResponse, UpstreamUnavailable
from service.domain.tenants import Account
from service.usecases.ports import RangeRequest
from tests.contract.artifact_server import PNG_IMAGE, file_response, make_fetcher, read_request, send_pieces
from tests.contract.client import USER_KEY
from tests.contract.scripted_server import Connection, Handler, http_response, run_server
from tests.support.certificates import create_certificate

LOOPBACK, OTHER_LOOPBACK = ip_address("127.0.0.1"), ip_address("127.0.0.2")
PRIVATE_URLS = [
    "http://127.0.0.1:{port}/1.png",
    "http://localhost:{port}/1.png",
    "http://[::1]:{port}/1.png",
    "http://[::ffff:127.0.0.1]:{port}/1.png",
    "http://2130706433:{port}/1.png",
    "http://10.0.0.1/1.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://upstream.example@127.0.0.1:{port}/1.png",
]


def make_resolver(names: Mapping[str, Sequence[IpAddress]]) -> Resolver:
    """Return a resolver for these names."""

    async def resolver(host: str) -> Sequence[IpAddress]:
        if host not in names:
            raise UnknownHost(host)
        return names[host]

    return resolver


def redirect_through(*locations: str) -> Handler:
    """Redirect through the locations, then send the artifact."""
    left = iter(locations)

    async def serve(connection: Connection) -> None:
        await read_request(connection)
        location = next(left, None)
        await connection.send(
            file_response()
            if location is None
            else http_response(b"moved", 302, Location=location.format(url=connection.server.url))
        )

    return serve


@pytest.mark.parametrize("url", PRIVATE_URLS)
async def test_private_address(url: str) -> None:
    """An artifact at a private address is refused for an account whose upstream is elsewhere."""
    caller = make_fetcher("http://upstream.example")
    async with run_server(send_pieces(file_response())) as peer:
        with pytest.raises(UpstreamInvalidResponse) as caught:
            await caller.fetch_all(url.format(port=peer.url.rpartition(":")[2]))
        assert peer.connections == 0
    assert "127.0.0.1" not in str(caught.value)
    assert caller.outcome == FetchOutcome.INVALID


@pytest.mark.parametrize("url", PRIVATE_URLS[:-1])
async def test_redirect_to_private_address(url: str) -> None:
    resolver = make_resolver(
        {"upstream.example": [LOOPBACK], "localhost": [LOOPBACK], "2130706433": [LOOPBACK]}
        | {text: [ip_address(text)] for text in ("127.0.0.1", "::1", "::ffff:127.0.0.1", "10.0.0.1", "169.254.169.254")}
    )
    caller = make_fetcher("http://upstream.example", resolver=resolver)
    async with run_server(send_pieces(file_response())) as inside:
        target = url.format(port=inside.url.rpartition(":")[2])
        async with run_server(redirect_through(target)) as peer:
            with pytest.raises(UpstreamInvalidResponse):
                await caller.fetch_all(peer.url.replace("127.0.0.1", "upstream.example"))
            assert len(peer.requests) == 1
        assert inside.connections == 0


async def test_own_upstream() -> None:
    """A private address is allowed only for the account whose upstream has it."""
    caller = make_fetcher(
        "http://other.example", resolver=make_resolver({"files.internal": [LOOPBACK], "other.example": [LOOPBACK]})
    )
    own = Account(1, "own", b"", base_url="http://FILES.internal:9000/base")
    other = Account(2, "other", b"")
    async with run_server(send_pieces(file_response())) as peer:
        url = peer.url.replace("127.0.0.1", "files.internal")
        async with caller.fetch(url, account=own) as fetched:
            assert await anext(fetched.chunks) == PNG_IMAGE
        for account in (other, None):
            with pytest.raises(UpstreamInvalidResponse):
                async with caller.fetch(url, account=account):
                    pass
        async with caller.fetch(peer.url.replace("127.0.0.1", "other.example"), account=other):
            pass
        with pytest.raises(UpstreamInvalidResponse):
            async with caller.fetch(peer.url.replace("127.0.0.1", "other.example"), account=own):
                pass
        assert len(peer.requests) == 2


async def test_changing_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves to a private address the second time is refused."""
    monkeypatch.setattr(artifacts, "is_public", lambda ip: ip == LOOPBACK)
    answers = iter([[LOOPBACK], [OTHER_LOOPBACK]])

    async def resolver(_: str) -> Sequence[IpAddress]:
        return next(answers)

    caller = make_fetcher("http://upstream.example", resolver=resolver)
    async with run_server(redirect_through("/again")) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await caller.fetch_all(peer.url.replace("127.0.0.1", "files.example"))
        assert peer.connections == 1


async def test_redirects() -> None:
    """Redirects, relative ones too, keep the request; each connection closes before the next opens."""
    caller = make_fetcher()
    async with run_server(redirect_through("/2.png", "{url}/3.png?a=b", "4.png")) as peer:
        _, content = await caller.fetch_all(
            f"{peer.url}/a/1.png", requested=RangeRequest(range="bytes=0-", if_range='"v1"')
        )
    lines = [sent.split(b"\r\n") for sent, _ in peer.requests]
    assert content == PNG_IMAGE
    assert [line[0].split()[1] for line in lines] == [b"/a/1.png", b"/2.png", b"/3.png?a=b", b"/4.png"]
    assert all(b'If-Range: "v1"' in line for line in lines)
    assert caller.outcome == FetchOutcome.DONE


async def test_key_in_the_url() -> None:
    """The account's key is put back into a URL stored without it."""
    async with run_server(send_pieces(file_response())) as peer:
        await make_fetcher().fetch_all(f"{peer.url}/1.png?k=%7Buser_key%7D")
    assert peer.requests[0][0].startswith(f"GET /1.png?k={USER_KEY} HTTP/1.1\r\n".encode())


async def test_too_many_redirects() -> None:
    async with run_server(redirect_through(*["/"] * MAX_REDIRECTS)) as peer:
        await make_fetcher().fetch_all(peer.url)
    async with run_server(redirect_through(*["/"] * (MAX_REDIRECTS + 1))) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await make_fetcher().fetch_all(peer.url)
        assert len(peer.requests) == MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    "location",
    [
        "ftp://127.0.0.1/1.png",
        "file:///etc/passwd",
        "data:image/png,x",
        "//",
        "http://",
        "http://[",
        "http://a:b/",
        "?",
    ],
)
async def test_redirects_to_nowhere(location: str) -> None:
    """A redirect to a non-HTTP URL, or in a circle, fails."""
    async with run_server(redirect_through(*[location] * 9)) as peer:
        with pytest.raises((UpstreamInvalidResponse, UpstreamUnavailable)):
            await make_fetcher().fetch_all(peer.url)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/1.png", "http://", "http://[/", "x", "http://a:b/"])
async def test_invalid_url(url: str) -> None:
    with pytest.raises((UpstreamInvalidResponse, UpstreamUnavailable)):
        await make_fetcher().fetch_all(url)


async def test_downgrade(tmp_path: Path) -> None:
    """A redirect from HTTPS to HTTP is refused; the other direction is followed."""
    trusted, context = create_certificate(tmp_path)
    tls = ssl.create_default_context(cafile=str(trusted))
    async with (
        run_server(send_pieces(file_response())) as plain,
        run_server(redirect_through(plain.url), tls=context) as safe,
    ):
        with pytest.raises(UpstreamInvalidResponse):
            await make_fetcher(tls=tls).fetch_all(safe.url)
        assert plain.connections == 0
    async with (
        run_server(send_pieces(file_response()), tls=context) as safe,
        run_server(redirect_through(safe.url)) as plain,
    ):
        assert (await make_fetcher(tls=tls).fetch_all(plain.url))[1] == PNG_IMAGE


async def test_certificate(tmp_path: Path) -> None:
    _, context = create_certificate(tmp_path)
    async with run_server(send_pieces(file_response()), tls=context) as peer, asyncio.timeout(10):
        with pytest.raises(UpstreamUnavailable):
            await make_fetcher().fetch_all(peer.url)
        assert not peer.requests
