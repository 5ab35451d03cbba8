"""Connections go only to checked addresses, whatever names resolve to and servers answer."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path
from unittest.mock import AsyncMock

import httpx2
import pytest

from service.clients.artifacts import MAX_REDIRECTS, FetchOutcome
from service.clients.egress import (
    AddressRefused,
    AllowAddress,
    GuardedTransport,
    Resolver,
    UnknownHost,
    resolve_host,
)
from service.domain import hosts
from service.domain.errors import UpstreamInvalidResponse, UpstreamUnavailable
from service.domain.hosts import IpAddress, is_public
from service.domain.tasks import Artifact, ArtifactName
from service.domain.tenants import Account
from service.usecases.ports import CheckOutcome, RangeRequest, SubmitOutcome
from tests.contract.client import make_fetcher, open_caller
from tests.contract.scripted_server import (
    ACCEPTED_RESPONSE,
    PNG_IMAGE,
    Connection,
    Handler,
    file_response,
    http_response,
    reply_and_close,
    reply_with,
    run_server,
    unreachable_address,
)
from tests.support.network import create_certificate, reserve_port

LOOPBACK = ip_address("127.0.0.1")
UNUSED_ADDRESS = ip_address("127.0.0.2")
"""A loopback address on which no server of these tests listens."""


PRIVATE = [
    *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.255.255.254", "168.63.129.16", "169.254.169.254", "172.31.255.255"),
    *("192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1"),
    *("224.0.0.1", "240.0.0.1", "::", "::1", "::8.8.8.8", "::ffff:8.8.8.8", "::ffff:127.0.0.1", "fd00:ec2::254"),
    *("64:ff9b::10.0.0.1", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "3fff::1"),
    *("5f00::1", "fe80::1%lo", "fec0::1", "ff02::1"),
]


def test_private_reserved_and_translating_addresses_are_not_public() -> None:
    public = ["8.8.8.8", "172.32.0.1", "2606:4700::1111", "64:ff9b::808:808"]
    assert [text for text in PRIVATE + public if is_public(ip_address(text))] == public


METADATA = [
    *("169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192", "::ffff:169.254.169.254"),
    *("fd00:ec2::254", "fd00:ec2:1::", "fd20:ce::254", "fe80::a9fe:a9fe%1", "64:ff9b::a9fe:a9fe"),
    *("64:ff9b:1::a9fe:a9fe", "2002:a9fe:a9fe::1", "::169.254.169.254"),
]


async def test_metadata_services_are_never_called() -> None:
    for text in METADATA:
        async with open_client(AsyncMock(return_value=[ip_address(text)])) as caller:
            with pytest.raises(AddressRefused):
                await caller.get("http://allowed.example", timeout=0.01)


async def test_an_upstream_whose_name_leads_to_a_metadata_service_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer, open_caller(peer.url) as caller:
        assert (await caller.submit()).outcome is SubmitOutcome.ACCEPTED
        monkeypatch.setattr(hosts, "_METADATA", (ip_network("127.0.0.0/8"),))
        assert (await caller.submit()).outcome is SubmitOutcome.NOT_SENT
        assert (await caller.check()).outcome is CheckOutcome.NO_RESPONSE
        assert len(peer.requests) == 1


async def test_names() -> None:
    for host in ("127.0.0.1", "127.1", "0x7f000001"):
        assert await resolve_host(host) == [LOOPBACK]
    assert await resolve_host("::1") == [ip_address("::1")]
    for host in ("", "two..dots", f"{'x' * 64}.example"):
        with pytest.raises(UnknownHost):
            await resolve_host(host)


@asynccontextmanager
async def open_client(
    resolver: Resolver,
    allow: AllowAddress = lambda _host, _port, _ip: True,
    *,
    tls: ssl.SSLContext | None = None,
    seconds: float = 10,
) -> AsyncIterator[httpx2.AsyncClient]:
    transport = GuardedTransport(allow, tls=tls or httpx2.create_ssl_context(), resolver=resolver)
    timeout = httpx2.Timeout(10, connect=seconds)
    async with httpx2.AsyncClient(transport=transport, trust_env=False, timeout=timeout) as client:
        yield client


def with_hostname(url: str) -> str:
    return url.replace("127.0.0.1", "Files.Example")


async def test_each_request_is_resolved_and_checked_once() -> None:
    requested: list[tuple[str, int, IpAddress]] = []

    def allow(host: str, port: int, ip: IpAddress) -> bool:
        requested.append((host, port, ip))
        return ip == LOOPBACK

    async with (
        run_server(reply_with(http_response(b"fine"))) as peer,
        open_client(AsyncMock(side_effect=[[LOOPBACK], [UNUSED_ADDRESS]]), allow) as caller,
    ):
        assert (await caller.post(with_hostname(peer.url), content=b"x")).content == b"fine"
        with pytest.raises(AddressRefused):
            await caller.post(with_hostname(peer.url), content=b"x")
        port = int(peer.url.rpartition(":")[2])
        assert requested == [("files.example", port, LOOPBACK), ("files.example", port, UNUSED_ADDRESS)]
        assert peer.connections == 1


async def test_the_next_allowed_address_gets_the_whole_request() -> None:
    async with run_server(reply_with(http_response(b"fine"))) as peer:
        async with open_client(AsyncMock(side_effect=[[UNUSED_ADDRESS, LOOPBACK]])) as caller:
            answer = await caller.post(f"{with_hostname(peer.url)}/a?b=c", content=b"content")
        ((head, body),) = peer.requests
        assert (answer.content, body) == (b"fine", b"content")
        assert head.startswith(b"POST /a?b=c HTTP/1.1\r\n")
        assert f"\r\nhost: files.example:{answer.request.url.port}\r\n".encode() in head.lower()
        async with open_client(
            AsyncMock(side_effect=[[LOOPBACK, UNUSED_ADDRESS]]), lambda _host, _port, ip: ip == UNUSED_ADDRESS
        ) as caller:
            with pytest.raises(httpx2.ConnectError):
                await caller.post(with_hostname(peer.url), content=b"x")
        assert peer.connections == 1


async def test_silent_addresses_and_resolvers_share_the_connect_timeout() -> None:
    async def resolve_never(_: str) -> Sequence[IpAddress]:
        await asyncio.Event().wait()
        return []

    port = reserve_port()
    with unreachable_address(str(UNUSED_ADDRESS), port):
        async with run_server(reply_with(http_response(b"fine")), port=port) as peer:
            async with open_client(AsyncMock(side_effect=[[UNUSED_ADDRESS, LOOPBACK]]), seconds=0.4) as caller:
                assert (await caller.post(with_hostname(peer.url), content=b"x")).content == b"fine"
            for resolver in (AsyncMock(side_effect=[[UNUSED_ADDRESS]]), resolve_never):
                async with open_client(resolver, seconds=0.1) as caller:
                    with pytest.raises(httpx2.ConnectTimeout):
                        await caller.post(with_hostname(peer.url), content=b"x")


@pytest.mark.parametrize(("subject", "trusted"), [("files.example", True), ("127.0.0.1", False)])
async def test_the_certificate_must_match_the_hostname(subject: str, trusted: bool, tmp_path: Path) -> None:
    public_part, context = create_certificate(tmp_path, subject)
    tls = ssl.create_default_context(cafile=str(public_part))
    async with (
        run_server(reply_with(http_response(b"fine")), tls=context) as peer,
        open_client(AsyncMock(side_effect=[[LOOPBACK]]), tls=tls) as caller,
    ):
        if trusted:
            assert (await caller.post(with_hostname(peer.url), content=b"x")).content == b"fine"
        else:
            with pytest.raises(httpx2.ConnectError, match=r"not valid for .files\.example"):
                await caller.post(with_hostname(peer.url), content=b"x")


def resolve_from(names: Mapping[str, str]) -> Resolver:
    async def resolver(host: str) -> Sequence[IpAddress]:
        if host not in names:
            raise UnknownHost(host)
        return [ip_address(names[host])]

    return resolver


def redirect_through(*locations: str) -> Handler:
    left = iter(locations)

    async def serve(connection: Connection) -> None:
        await connection.receive()
        location = next(left, "").format(url=connection.server.url)
        await connection.send(http_response(b"moved", 302, Location=location) if location else file_response())

    return serve


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/1.png",
        "http://localhost:{port}/1.png",
        "http://[::ffff:127.0.0.1]:{port}/1.png",
        "http://2130706433:{port}/1.png",
        "http://169.254.169.254/latest/meta-data/",
        "http://upstream.internal:{port}/1.png",
        "http://upstream.internal@127.0.0.1:{port}/1.png",
    ],
)
async def test_artifacts_at_private_addresses_are_refused(url: str) -> None:
    names = dict.fromkeys(("upstream.internal", "localhost", "2130706433"), "127.0.0.1")
    names |= {text: text for text in ("127.0.0.1", "::ffff:127.0.0.1", "169.254.169.254")}
    async with run_server(reply_and_close(file_response())) as inside:
        target = url.format(port=inside.url.rpartition(":")[2])
        async with run_server(redirect_through(target)) as peer:
            upstream_url = peer.url.replace("127.0.0.1", "upstream.internal")
            caller = make_fetcher(upstream_url, resolver=resolve_from(names))
            with pytest.raises(UpstreamInvalidResponse) as caught:
                await caller.fetch_all(target)
            assert "127.0.0.1" not in str(caught.value)
            with pytest.raises(UpstreamInvalidResponse):
                await caller.fetch_all(upstream_url)
            assert len(peer.requests) == 1
        assert inside.connections == 0
    assert caller.outcomes == [FetchOutcome.INVALID] * 2


@pytest.mark.parametrize(
    ("base_url", "host", "allowed"),
    [
        ("http://FILES.internal:{port}/base", "files.internal", True),
        ("http://files.internal:9000", "files.internal", False),
        ("http://files.internal", "files.internal", False),
        ("http://other.internal:{port}", "files.internal", False),
        ("http://127.1:{port}", "127.1", True),
        ("http://corp.example:{port}", "corp.example", True),  # as set
        ("http://upstream.example:{port}", "upstream.example", False),  # its owner may resolve it to any address
        (None, "files.internal", False),
    ],
)
async def test_private_addresses_are_for_an_account_of_that_host_and_port(
    base_url: str | None, host: str, allowed: bool
) -> None:
    names = dict.fromkeys(("127.1", "files.internal", "corp.example", "upstream.example"), "127.0.0.1")
    caller = make_fetcher(resolver=resolve_from(names), private_domains=["internal", "corp.example"])
    async with run_server(reply_and_close(file_response())) as peer:
        port = peer.url.rpartition(":")[2]
        account = Account(1, "own", b"", base_url=base_url and base_url.format(port=port))
        fetching = caller.fetch_all(f"http://{host}:{port}", account=account)
        if allowed:
            assert (await fetching)[1] == PNG_IMAGE
        else:
            with pytest.raises(UpstreamInvalidResponse):
                await fetching
        assert len(peer.requests) == allowed


@pytest.mark.usefixtures("public_loopback")
async def test_redirects_keep_the_request() -> None:
    async with run_server(redirect_through("/2.png", "{url}/3.png?a=b", "4.png", "/5", "/6")) as peer:
        _, content = await make_fetcher().fetch_all(
            f"{peer.url}/a/1.png?k=%7Buser_key%7D", requested=RangeRequest(range="bytes=0-", if_range='"v1"')
        )
    lines = [sent.decode().split("\r\n") for sent, _ in peer.requests]
    paths = ["/a/1.png?k=%7Buser_key%7D", "/2.png", "/3.png?a=b", "/4.png", "/5", "/6"]
    assert content == PNG_IMAGE
    assert [line[0].split()[1] for line in lines] == paths
    assert all('If-Range: "v1"' in line for line in lines)


async def test_a_link_that_was_encrypted_with_a_lost_secret_is_not_fetched() -> None:
    async with run_server(reply_and_close(file_response())) as peer:
        artifact = Artifact(ArtifactName.IMAGE, peer.url, b"encrypted by another")
        with pytest.raises(UpstreamInvalidResponse):
            await make_fetcher().client.fetch(None, artifact, RangeRequest()).__aenter__()
    assert peer.connections == 0


@pytest.mark.usefixtures("public_loopback")
@pytest.mark.parametrize("location", ["/", "file:///etc/passwd", "//", "http://["])
async def test_endless_and_invalid_redirects(location: str) -> None:
    async with run_server(redirect_through(*[location] * 9)) as peer:
        with pytest.raises((UpstreamInvalidResponse, UpstreamUnavailable)):
            await make_fetcher().fetch_all(peer.url)
    assert len(peer.requests) <= MAX_REDIRECTS + 1


@pytest.mark.usefixtures("public_loopback")
async def test_a_redirect_from_https_to_http_is_refused(tmp_path: Path) -> None:
    trusted, context = create_certificate(tmp_path)
    fetcher = make_fetcher(tls=ssl.create_default_context(cafile=str(trusted)))
    async with run_server(reply_and_close(file_response())) as plain:
        async with run_server(redirect_through(plain.url), tls=context) as safe:
            with pytest.raises(UpstreamInvalidResponse):
                await fetcher.fetch_all(safe.url)
        assert plain.connections == 0
    async with (
        run_server(reply_and_close(file_response()), tls=context) as safe,
        run_server(redirect_through(safe.url)) as plain,
    ):
        assert (await fetcher.fetch_all(plain.url))[1] == PNG_IMAGE
