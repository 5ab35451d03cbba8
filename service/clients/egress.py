"""Protection against requests to addresses that are not public."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from types import TracebackType
from typing import Any, Self

import httpx2

IpAddress = IPv4Address | IPv6Address


Resolver = Callable[[str], Awaitable[Sequence[IpAddress]]]
"""The addresses of a host, best first. Raises UnknownHost if there are none."""


AllowAddress = Callable[[str, IpAddress], bool]
"""Whether a host, in lower case and as the URL has it, may be reached at one of its addresses."""


_NON_PUBLIC_IPV4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # behind carrier-grade NAT; also the metadata service of one cloud
        "127.0.0.0/8",
        "168.63.129.16/32",  # looks public, is the host agent of another cloud
        "169.254.0.0/16",  # link-local, with the metadata services of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",  # for documentation, as the two further down
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)


_GLOBAL_IPV6 = IPv6Network("2000::/3")
"""All that is handed out. Outside of it lie loopback, mapped, unique local, link-local, site-local, multicast, …"""


_NON_PUBLIC_IPV6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # for protocols, with Teredo among them
        "2001:db8::/32",  # for documentation, as the last
        "2002::/16",  # 6to4: leads to an IPv4 address
        "3fff::/20",
    )
)


_NAT64 = IPv6Network("64:ff9b::/96")
"""Stands for the IPv4 address in its last 32 bits; in a network without IPv4 every other host has such an address."""


class UnknownHost(httpx2.ConnectError):
    """The name has no address, or no name server told one."""


class AddressRefused(httpx2.ConnectError):
    """None of the addresses of the host may be reached."""


def is_public(ip: IpAddress) -> bool:
    """Whether an address is one of the public internet, and leads nowhere else."""
    if isinstance(ip, IPv4Address):
        return not any(ip in network for network in _NON_PUBLIC_IPV4)
    if ip in _NAT64:
        return is_public(IPv4Address(ip.packed[-4:]))
    return ip in _GLOBAL_IPV6 and not any(ip in network for network in _NON_PUBLIC_IPV6)


async def resolve_host(host: str) -> Sequence[IpAddress]:
    """The addresses of a name, or of an address as text, in the order in which the system would try them.

    Raises UnknownHost.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnknownHost(f"{host} has no address: {error}") from error
    return list(dict.fromkeys(ip_address(sockaddr[0]) for *_, sockaddr in found))


class GuardedTransport(httpx2.AsyncBaseTransport):
    """Sends requests to allowed addresses only, each over a connection of its own.

    A kept connection would be used again without a check, and for another name at the same address.
    """

    def __init__(self, allow: AllowAddress, *, tls: ssl.SSLContext, resolver: Resolver = resolve_host) -> None:
        self._allow = allow
        self._resolve = resolver
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self._inner = httpx2.AsyncHTTPTransport(verify=tls, trust_env=False, limits=limits)

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._inner.__aexit__(exc_type, exc_value, traceback)

    async def aclose(self) -> None:
        """Close what is still open."""
        await self._inner.aclose()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request to the first allowed address of its host that takes the connection."""
        host = request.url.raw_host.decode("ascii").lower()
        timeout: dict[str, Any] = request.extensions.get("timeout", {})
        seconds: float | None = timeout.get("connect")
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            async with asyncio.timeout(seconds):
                addresses = await self._resolve(host)
        except TimeoutError:
            raise httpx2.ConnectTimeout(f"{host} could not be resolved in time") from None
        allowed = [ip for ip in addresses if self._allow(host, ip)]
        if not allowed:
            raise AddressRefused(f"{host} has no address that may be reached")
        while True:
            ip, *others = allowed
            # An address that swallows all packets must leave time for those after it.
            share = None if deadline is None else max(deadline - time.monotonic(), 0) / len(allowed)
            try:
                return await self._inner.handle_async_request(
                    _build_address_request(ip, host, request, timeout | {"connect": share})
                )
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if not others:
                    raise
                allowed = others


def _build_address_request(
    ip: IpAddress, host: str, request: httpx2.Request, timeout: dict[str, Any]
) -> httpx2.Request:
    """A request as it goes to one address of its host."""
    headers = request.headers.copy()
    # Without this a connection is free for the next request for a moment, before it is closed.
    headers["Connection"] = "close"
    return httpx2.Request(
        request.method,
        request.url.copy_with(host=str(ip)),
        headers=headers,
        stream=request.stream,
        extensions=request.extensions | {"timeout": timeout, "sni_hostname": host},
    )
