"""Where results are fetched from, whatever the upstream and its servers say."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path

import pytest

from service.clients import artifacts
from service.clients.artifacts import MOST_REDIRECTS, Outcome
from service.clients.egress import Address, Resolver, UnknownHost
from service.domain.errors import UpstreamInvalidResponse, UpstreamUnavailable
from service.domain.tenants import Account
from service.usecases.ports import Asked
from tests.contract.client import USER_KEY
from tests.contract.origin import PICTURE, asked, fetcher, file, giving
from tests.contract.peer import Connection, Serve, http, serving
from tests.support.certificates import certify

HERE, ELSEWHERE = ip_address("127.0.0.1"), ip_address("127.0.0.2")
PRIVATE = [
    "http://127.0.0.1:{port}/1.png",
    "http://localhost:{port}/1.png",
    "http://[::1]:{port}/1.png",
    "http://[::ffff:127.0.0.1]:{port}/1.png",
    "http://2130706433:{port}/1.png",
    "http://10.0.0.1/1.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://upstream.example@127.0.0.1:{port}/1.png",
]


def resolving(names: Mapping[str, Sequence[Address]]) -> Resolver:
    """A name server that knows these."""

    async def resolver(host: str) -> Sequence[Address]:
        if host not in names:
            raise UnknownHost(host)
        return names[host]

    return resolver


def sending_on(*locations: str) -> Serve:
    """Send who asks on to one location after the other, and then give the result."""
    left = iter(locations)

    async def serve(connection: Connection) -> None:
        await asked(connection)
        location = next(left, None)
        await connection.send(
            file() if location is None else http(b"moved", 302, Location=location.format(url=connection.peer.url))
        )

    return serve


@pytest.mark.parametrize("url", PRIVATE)
async def test_private_address(url: str) -> None:
    """A result at a private address is not fetched for an account whose upstream is elsewhere."""
    caller = fetcher("http://upstream.example")
    async with serving(giving(file())) as peer:
        with pytest.raises(UpstreamInvalidResponse) as caught:
            await caller.get(url.format(port=peer.url.rpartition(":")[2]))
        assert peer.connections == 0
    assert "127.0.0.1" not in str(caught.value)
    assert caller.outcome == Outcome.UNUSABLE


@pytest.mark.parametrize("url", PRIVATE[:-1])
async def test_redirect_to_private_address(url: str) -> None:
    """A server can't send the gateway on to a private address."""
    resolver = resolving(
        {"upstream.example": [HERE], "localhost": [HERE], "2130706433": [HERE]}
        | {text: [ip_address(text)] for text in ("127.0.0.1", "::1", "::ffff:127.0.0.1", "10.0.0.1", "169.254.169.254")}
    )
    caller = fetcher("http://upstream.example", resolver=resolver)
    async with serving(giving(file())) as inside:
        target = url.format(port=inside.url.rpartition(":")[2])
        async with serving(sending_on(target)) as peer:
            with pytest.raises(UpstreamInvalidResponse):
                await caller.get(peer.url.replace("127.0.0.1", "upstream.example"))
            assert len(peer.requests) == 1
        assert inside.connections == 0


async def test_own_upstream() -> None:
    """A private address is fetched from for the account whose own upstream is there, and for no other."""
    caller = fetcher("http://other.example", resolver=resolving({"files.internal": [HERE], "other.example": [HERE]}))
    own = Account(1, "own", b"", base_url="http://FILES.internal:9000/base")
    other = Account(2, "other", b"")
    async with serving(giving(file())) as peer:
        url = peer.url.replace("127.0.0.1", "files.internal")
        async with caller.fetch(url, account=own) as fetched:
            assert await anext(fetched.chunks) == PICTURE
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
    """A name that means a private address the second time is not followed there."""
    monkeypatch.setattr(artifacts, "public", lambda ip: ip == HERE)
    answers = iter([[HERE], [ELSEWHERE]])

    async def resolver(_: str) -> Sequence[Address]:
        return next(answers)

    caller = fetcher("http://upstream.example", resolver=resolver)
    async with serving(sending_on("/again")) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await caller.get(peer.url.replace("127.0.0.1", "files.example"))
        assert peer.connections == 1


async def test_redirects() -> None:
    """Redirects are followed, relative ones too, with what was asked for; each connection is closed before the next."""
    caller = fetcher()
    async with serving(sending_on("/2.png", "{url}/3.png?a=b", "4.png")) as peer:
        _, found = await caller.get(f"{peer.url}/a/1.png", asked=Asked(range="bytes=0-", if_range='"v1"'))
    lines = [sent.split(b"\r\n") for sent, _ in peer.requests]
    assert found == PICTURE
    assert [each[0].split()[1] for each in lines] == [b"/a/1.png", b"/2.png", b"/3.png?a=b", b"/4.png"]
    assert all(b'If-Range: "v1"' in each for each in lines)
    assert caller.outcome == Outcome.DONE


async def test_key_in_the_address() -> None:
    """The key of the account is put back into an address that is kept without it."""
    async with serving(giving(file())) as peer:
        await fetcher().get(f"{peer.url}/1.png?k=%7Buser_key%7D")
    assert peer.requests[0][0].startswith(f"GET /1.png?k={USER_KEY} HTTP/1.1\r\n".encode())


async def test_too_many_redirects() -> None:
    """Who is sent on too often gives up."""
    async with serving(sending_on(*["/"] * MOST_REDIRECTS)) as peer:
        await fetcher().get(peer.url)
    async with serving(sending_on(*["/"] * (MOST_REDIRECTS + 1))) as peer:
        with pytest.raises(UpstreamInvalidResponse):
            await fetcher().get(peer.url)
        assert len(peer.requests) == MOST_REDIRECTS + 1


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
    """A redirect to what can't be fetched over HTTP leads to nothing, or back to where it came from."""
    async with serving(sending_on(*[location] * 9)) as peer:
        with pytest.raises((UpstreamInvalidResponse, UpstreamUnavailable)):
            await fetcher().get(peer.url)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/1.png", "http://", "http://[/", "x", "http://a:b/"])
async def test_no_address(url: str) -> None:
    """What is no address of HTTP is not fetched."""
    with pytest.raises((UpstreamInvalidResponse, UpstreamUnavailable)):
        await fetcher().get(url)


async def test_downgrade(tmp_path: Path) -> None:
    """From a safe connection nobody is sent on to one that is not safe; the other way round is welcome."""
    trusted, context = certify(tmp_path)
    tls = ssl.create_default_context(cafile=str(trusted))
    async with serving(giving(file())) as plain, serving(sending_on(plain.url), tls=context) as safe:
        with pytest.raises(UpstreamInvalidResponse):
            await fetcher(tls=tls).get(safe.url)
        assert plain.connections == 0
    async with serving(giving(file()), tls=context) as safe, serving(sending_on(safe.url)) as plain:
        assert (await fetcher(tls=tls).get(plain.url))[1] == PICTURE


async def test_certificate(tmp_path: Path) -> None:
    """A server with a certificate that is not trusted gives nothing."""
    _, context = certify(tmp_path)
    async with serving(giving(file()), tls=context) as peer, asyncio.timeout(10):
        with pytest.raises(UpstreamUnavailable):
            await fetcher().get(peer.url)
        assert not peer.requests
