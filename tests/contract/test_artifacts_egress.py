"""Artifacts are fetched only from allowed addresses, whatever the upstream and its servers answer."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path

import pytest

from service.clients.artifacts import MAX_REDIRECTS, FetchOutcome
from service.clients.egress import IpAddress, Resolver, UnknownHost
from service.domain.errors import UpstreamInvalidResponse, UpstreamUnavailable
from service.domain.tenants import Account
from service.usecases.ports import RangeRequest
from tests.contract.artifact_server import PNG_IMAGE, file_response, make_fetcher, read_request, send_pieces
from tests.contract.client import USER_KEY
from tests.contract.scripted_server import Connection, Handler, http_response, run_server
from tests.support.network import create_certificate

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
    """A private address is refused for an account whose upstream is elsewhere, also behind a redirect."""
    names = ("127.0.0.1", "::1", "::ffff:127.0.0.1", "10.0.0.1", "169.254.169.254")
    resolver = make_resolver(
        {"upstream.example": [LOOPBACK], "localhost": [LOOPBACK], "2130706433": [LOOPBACK]}
        | {text: [ip_address(text)] for text in names}
    )
    caller = make_fetcher("http://upstream.example", resolver=resolver)
    async with run_server(send_pieces(file_response())) as inside:
        target = url.format(port=inside.url.rpartition(":")[2])
        with pytest.raises(UpstreamInvalidResponse) as caught:
            await caller.fetch_all(target)
        assert "127.0.0.1" not in str(caught.value)
        async with run_server(redirect_through(target)) as peer:
            with pytest.raises(UpstreamInvalidResponse):
                await caller.fetch_all(peer.url.replace("127.0.0.1", "upstream.example"))
            assert len(peer.requests) == 1
        assert inside.connections == 0
    assert caller.outcomes == [FetchOutcome.INVALID] * 2


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


async def test_redirects() -> None:
    """Redirects, relative ones too, keep the request; the account's key is put back into the URL."""
    caller = make_fetcher()
    async with run_server(redirect_through("/2.png", "{url}/3.png?a=b", "4.png", "/5", "/6")) as peer:
        _, content = await caller.fetch_all(
            f"{peer.url}/a/1.png?k=%7Buser_key%7D", requested=RangeRequest(range="bytes=0-", if_range='"v1"')
        )
    lines = [sent.decode().split("\r\n") for sent, _ in peer.requests]
    paths = [f"/a/1.png?k={USER_KEY}", "/2.png", "/3.png?a=b", "/4.png", "/5", "/6"]
    assert content == PNG_IMAGE
    assert [line[0].split()[1] for line in lines] == paths
    assert all('If-Range: "v1"' in line for line in lines)


@pytest.mark.parametrize("location", ["/", "ftp://127.0.0.1/1.png", "file:///etc/passwd", "//", "http://[", "?"])
async def test_endless_and_invalid_redirects(location: str) -> None:
    async with run_server(redirect_through(*[location] * 9)) as peer:
        with pytest.raises((UpstreamInvalidResponse, UpstreamUnavailable)):
            await make_fetcher().fetch_all(peer.url)
    assert len(peer.requests) <= MAX_REDIRECTS + 1


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
