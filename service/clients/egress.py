"""HTTP transport that connects only to checked addresses, against server-side request forgery.

A name is resolved once per request, its addresses are checked, and the connection goes to a checked address: a second
DNS response has no effect.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

import httpx2

IpAddress = IPv4Address | IPv6Address
Resolver = Callable[[str], Awaitable[Sequence[IpAddress]]]
"""Returns the addresses of a host, best first. Raises UnknownHost."""
AllowAddress = Callable[[str, IpAddress], bool]
"""Returns whether a host (lower case, as in the URL) may be reached at an address."""
_NON_PUBLIC_IPV4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # behind carrier-grade NAT; also the metadata service of one cloud
        "127.0.0.0/8",
        "168.63.129.16/32",  # public range, but the host agent of another cloud
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
"""All allocated addresses. Loopback, mapped, unique local, link-local, site-local and multicast lie outside."""
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
"""Embeds an IPv4 address in the last 32 bits; common in networks without IPv4."""


class UnknownHost(httpx2.ConnectError):
    """The name does not resolve."""


class AddressRefused(httpx2.ConnectError):
    """No address of the host is allowed."""


def is_public(ip: IpAddress) -> bool:
    """Return whether an address is public and does not embed or tunnel to a private one."""
    if isinstance(ip, IPv4Address):
        return not any(ip in network for network in _NON_PUBLIC_IPV4)
    if ip in _NAT64:
        return is_public(IPv4Address(ip.packed[-4:]))
    return ip in _GLOBAL_IPV6 and not any(ip in network for network in _NON_PUBLIC_IPV6)


async def resolve_host(host: str) -> Sequence[IpAddress]:
    """Return the addresses of a name or literal in the system's order of preference. Raises UnknownHost."""
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnknownHost(f"{host} has no address: {error}") from error
    return list(dict.fromkeys(ip_address(sockaddr[0]) for *_, sockaddr in infos))


class GuardedTransport(httpx2.AsyncBaseTransport):
    """A transport to allowed addresses only, each request over a new connection.

    A kept connection would be reused without a check, and for another name at the same address. Raises AddressRefused
    or UnknownHost, which are ConnectErrors: nothing was sent. `Host` and TLS server name remain those of the URL. The
    connect timeout covers resolving and all attempts.
    """

    def __init__(self, allow: AllowAddress, *, tls: ssl.SSLContext, resolver: Resolver = resolve_host) -> None:
        self._allow = allow
        self._resolve = resolver
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self._inner = httpx2.AsyncHTTPTransport(verify=tls, trust_env=False, limits=limits)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
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
            ip, *remaining = allowed
            # An address that drops all packets must leave time for the others.
            share = None if deadline is None else max(deadline - time.monotonic(), 0) / len(allowed)
            try:
                return await self._inner.handle_async_request(
                    _build_address_request(ip, host, request, timeout | {"connect": share})
                )
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if not remaining:
                    raise
                allowed = remaining


def _build_address_request(
    ip: IpAddress, host: str, request: httpx2.Request, timeout: dict[str, Any]
) -> httpx2.Request:
    headers = request.headers.copy()
    # Otherwise the pool could reuse the connection in the moment before it is closed.
    headers["Connection"] = "close"
    return httpx2.Request(
        request.method,
        request.url.copy_with(host=str(ip)),
        headers=headers,
        stream=request.stream,
        extensions=request.extensions | {"timeout": timeout, "sni_hostname": host},
    )
