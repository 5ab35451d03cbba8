"""Connections go only to checked addresses, whatever names resolve to."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
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
from tests.support.network import create_certificate, reserve_port

LOOPBACK = ip_address("127.0.0.1")
UNUSED_ADDRESS = ip_address("127.0.0.2")
"""A loopback address on which no server of these tests listens."""


@pytest.mark.parametrize("text", ["8.8.8.8", "172.32.0.1", "2606:4700::1111", "64:ff9b::808:808"])
def test_public(text: str) -> None:
    """Addresses of the internet are public, also as IPv4 translated into IPv6."""
    assert is_public(ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.255.254", "168.63.129.16", "169.254.169.254"),
        *("172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1"),
        *("198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "::8.8.8.8"),
        *("::ffff:8.8.8.8", "::ffff:127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b:1::1", "100::1", "2001::1"),
        *("2001:db8::1", "2002:7f00:1::", "2002:808:808::", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254"),
        *("fe80::1", "fe80::1%lo", "fec0::1", "ff02::1"),
    ],
)
def test_not_public(text: str) -> None:
    """Private, reserved and IPv4-translating addresses are not public."""
    assert not is_public(ip_address(text))


async def test_names() -> None:
    """An address in any spelling resolves to itself; an invalid name has no address."""
    for host, address in (
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("127.1", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1"),
    ):
        assert await resolve_host(host) == [ip_address(address)]
    for host in ("", "two..dots", f"{'x' * 64}.example"):
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
    """The checked address is the one connected to, and the next request is resolved and checked again."""
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
        assert b"\r\nconnection: close\r\n" in peer.requests[0][0].lower()


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


async def test_connect_timeout() -> None:
    """An address that never answers leaves time for the others; resolution shares the timeout."""

    async def resolver(_: str) -> Sequence[IpAddress]:
        await asyncio.Event().wait()
        return []

    port = reserve_port()
    with ExitStack() as sockets:
        deaf = sockets.enter_context(socket.create_server((str(UNUSED_ADDRESS), port), backlog=0))
        for _ in range(3):
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        async with run_server(reply_with(http_response(b"fine")), port=port) as peer:
            async with open_client(make_resolver([UNUSED_ADDRESS, LOOPBACK]), seconds=0.4) as caller:
                assert (await caller.post(with_hostname(peer.url), content=b"x")).content == b"fine"
            for resolve in (make_resolver([UNUSED_ADDRESS]), resolver):
                async with open_client(resolve, seconds=0.1) as caller:
                    with pytest.raises(httpx2.ConnectTimeout):
                        await caller.post(with_hostname(peer.url), content=b"x")


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
