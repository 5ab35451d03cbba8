"""Connections go only to checked addresses, whatever names resolve to."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

import httpx2
import pytest

from service.clients.egress import (
    AddressRefused,
    AllowAddress,
    GuardedTransport,
    IpAddress,
    Resolver,
    UnknownHost,
    is_public,
    resolve_host,
)
from tests.contract.scripted_server import http_response, reply_with, run_server
from tests.support.certificates import create_certificate

LOOPBACK = ip_address("127.0.0.1")
UNUSED_ADDRESS = ip_address("127.0.0.2")
"""A loopback address on which no server of these tests listens."""


@pytest.mark.parametrize("text", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700::1111", "64:ff9b::808:808"])
def test_public(text: str) -> None:
    """Addresses of the internet are public, also as IPv4 mapped into IPv6."""
    assert is_public(ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::8.8.8.8",
        "::ffff:8.8.8.8",
        "::ffff:127.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:808:808::",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%lo",
        "fec0::1",
        "ff02::1",
    ],
)
def test_not_public(text: str) -> None:
    """Private, reserved and IPv4-translating addresses are not public."""
    assert not is_public(ip_address(text))


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("127.1", "127.0.0.1"), ("0x7f000001", "127.0.0.1")],
)
async def test_literals(host: str, address: str) -> None:
    """An address in any spelling resolves to itself."""
    assert await resolve_host(host) == [ip_address(address)]


@pytest.mark.parametrize("host", ["", "two..dots", f"{'x' * 64}.example"])
async def test_unknown_hosts(host: str) -> None:
    with pytest.raises(UnknownHost):
        await resolve_host(host)


def make_resolver(*answers: Sequence[IpAddress]) -> Resolver:
    """Return a resolver that gives the next of these answers each time."""
    left = iter(answers)

    async def resolver(_: str) -> Sequence[IpAddress]:
        return next(left)

    return resolver


def allow_any(_host: str, _ip: IpAddress) -> bool:
    return True


@asynccontextmanager
async def open_client(
    resolver: Resolver, allow: AllowAddress = allow_any, *, tls: ssl.SSLContext | None = None, seconds: float = 10
) -> AsyncIterator[httpx2.AsyncClient]:
    transport = GuardedTransport(allow, tls=tls or httpx2.create_ssl_context(), resolver=resolver)
    timeout = httpx2.Timeout(10, connect=seconds)
    async with httpx2.AsyncClient(transport=transport, trust_env=False, timeout=timeout) as client:
        yield client


def with_hostname(url: str) -> str:
    """Return a server's URL with another hostname."""
    return url.replace("127.0.0.1", "Files.Example")


async def test_resolved_once() -> None:
    """The checked address is the one connected to, although the next resolution would differ."""
    requested: list[tuple[str, IpAddress]] = []

    def allow(host: str, ip: IpAddress) -> bool:
        requested.append((host, ip))
        return ip == LOOPBACK

    async with (
        run_server(reply_with(http_response(b"fine"))) as peer,
        open_client(make_resolver([LOOPBACK], [UNUSED_ADDRESS]), allow) as caller,
    ):
        assert (await caller.post(with_hostname(peer.url), content=b"x")).content == b"fine"
        with pytest.raises(AddressRefused):
            await caller.post(with_hostname(peer.url), content=b"x")
        assert requested == [("files.example", LOOPBACK), ("files.example", UNUSED_ADDRESS)]
        assert peer.connections == 1


async def test_each_request_is_checked() -> None:
    """A connection that an earlier request was allowed to make is not reused unchecked."""
    verdicts = iter([True, False])
    async with (
        run_server(reply_with(http_response(b""))) as peer,
        open_client(make_resolver([LOOPBACK], [LOOPBACK]), lambda _host, _ip: next(verdicts)) as caller,
    ):
        await caller.post(with_hostname(peer.url), content=b"x")
        with pytest.raises(AddressRefused):
            await caller.post(with_hostname(peer.url), content=b"x")
        assert b"\r\nconnection: close\r\n" in peer.requests[0][0].lower()
        assert len(peer.requests) == 1


async def test_only_allowed_addresses() -> None:
    """Of several addresses only the allowed ones are tried."""
    async with (
        run_server(reply_with(http_response(b""))) as peer,
        open_client(make_resolver([LOOPBACK, UNUSED_ADDRESS]), lambda _host, ip: ip == UNUSED_ADDRESS) as caller,
    ):
        with pytest.raises(httpx2.ConnectError):
            await caller.post(with_hostname(peer.url), content=b"x")
        assert peer.connections == 0


async def test_next_address() -> None:
    """If an address refuses the connection, the next one gets the whole request with the hostname."""
    async with (
        run_server(reply_with(http_response(b"fine"))) as peer,
        open_client(make_resolver([UNUSED_ADDRESS, LOOPBACK])) as caller,
    ):
        answer = await caller.post(f"{with_hostname(peer.url)}/a?b=c", content=b"content")
        ((head, body),) = peer.requests
        assert answer.content == b"fine"
        assert head.startswith(b"POST /a?b=c HTTP/1.1\r\n")
        assert f"\r\nhost: files.example:{answer.request.url.port}\r\n".encode() in head.lower()
        assert body == b"content"


async def test_address_without_answer() -> None:
    """An address that never answers leaves time for the others."""
    with socket.create_server((str(UNUSED_ADDRESS), 0), backlog=0) as deaf:
        port = deaf.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]
        try:
            for item in waiting:
                item.setblocking(False)
                item.connect_ex((str(UNUSED_ADDRESS), port))
            async with run_server(reply_with(http_response(b"fine")), port=port) as peer:
                async with open_client(make_resolver([UNUSED_ADDRESS, LOOPBACK]), seconds=0.4) as caller:
                    assert (await caller.post(with_hostname(peer.url), content=b"x")).content == b"fine"
                async with open_client(make_resolver([UNUSED_ADDRESS]), seconds=0.1) as caller:
                    with pytest.raises(httpx2.ConnectTimeout):
                        await caller.post(with_hostname(peer.url), content=b"x")
        finally:
            for entry in waiting:
                entry.close()


async def test_slow_resolver() -> None:
    """Resolution shares the connect timeout."""

    async def resolver(_: str) -> Sequence[IpAddress]:
        await asyncio.Event().wait()
        return []

    async with open_client(resolver, seconds=0.05) as caller:
        with pytest.raises(httpx2.ConnectTimeout):
            await caller.get("http://files.example")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "localhost", "2130706433"])
async def test_loopback(host: str) -> None:
    """This machine is not public under any of its names."""
    async with open_client(resolve_host, lambda _host, ip: is_public(ip)) as caller:
        with pytest.raises(AddressRefused):
            await caller.get(f"http://{host}:1/")


async def test_certificates(tmp_path: Path) -> None:
    """The certificate must match the hostname; one for the address is not enough."""
    for subject, trusted in (("files.example", True), ("127.0.0.1", False)):
        public_part, context = create_certificate(tmp_path, subject)
        tls = ssl.create_default_context(cafile=str(public_part))
        async with (
            run_server(reply_with(http_response(b"fine")), tls=context) as peer,
            open_client(make_resolver([LOOPBACK]), tls=tls) as caller,
        ):
            if trusted:
                assert (await caller.post(with_hostname(peer.url), content=b"x")).content == b"fine"
            else:
                with pytest.raises(httpx2.ConnectError, match=r"not valid for .files\.example"):
                    await caller.post(with_hostname(peer.url), content=b"x")
