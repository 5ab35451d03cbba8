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
from ipaddress import ip_address
from typing import Any

import anyio
import anyio.abc
import httpcore2
import httpx2
from httpcore2._backends.anyio import AnyIOStream

from service.domain.hosts import WEB_PORT, WEB_PORT_TLS, IpAddress, is_metadata

Resolver = Callable[[str], Awaitable[Sequence[IpAddress]]]
"""Returns the addresses of a host, best first. Raises UnknownHost."""
AllowAddress = Callable[[str, int, IpAddress], bool]
"""Returns whether a host (lower case, as in the URL) may be reached at a port of an address."""


class UnknownHost(httpx2.ConnectError):
    """The name does not resolve."""


class AddressRefused(httpx2.ConnectError):
    """No address of the host is allowed."""


async def resolve_host(host: str) -> Sequence[IpAddress]:
    """Return the addresses of a name or literal in the system's order of preference. Raises UnknownHost."""
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnknownHost(f"{host} has no address: {error}") from error
    return list(dict.fromkeys(ip_address(sockaddr[0]) for *_, sockaddr in infos))


class _SocketStream(anyio.abc.ByteStream):
    """A connection of which nothing is read ahead.

    anyio's own reads until its reader runs again: with uvloop all that the kernel holds, up to 6 MB.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._loop = asyncio.get_running_loop()

    async def receive(self, max_bytes: int = 65_536) -> bytes:
        try:
            data = await self._loop.sock_recv(self._socket, max_bytes)
        except OSError as error:
            raise anyio.BrokenResourceError from error
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        try:
            await self._loop.sock_sendall(self._socket, item)
        except OSError as error:
            raise anyio.BrokenResourceError from error

    async def send_eof(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        self._socket.close()


class _UnbufferedBackend(httpcore2.AnyIOBackend):
    """Connects to IP addresses."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - as the base class has it
        *_: Any,
        **__: Any,
    ) -> httpcore2.AsyncNetworkStream:
        connecting: socket.socket | None = None
        try:
            connecting = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            connecting.setblocking(False)
            connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(timeout):
                await asyncio.get_running_loop().sock_connect(connecting, (host, port))
            stream, connecting = _SocketStream(connecting), None
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error
        finally:
            if connecting:
                connecting.close()
        return AnyIOStream(stream)


class _UnbufferedTransport(httpx2.AsyncHTTPTransport):
    """A transport that keeps no connection, and reads of a response only what is asked for."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        super().__init__(verify=tls, trust_env=False)
        self._pool = httpcore2.AsyncConnectionPool(  # the transport has no parameter for the backend
            ssl_context=tls, max_connections=None, max_keepalive_connections=0, network_backend=_UnbufferedBackend()
        )


class GuardedTransport(httpx2.AsyncBaseTransport):
    """A transport to allowed addresses only, each request over a new connection; never to a metadata service.

    A kept connection would be reused without a check, and for another name at the same address. Raises AddressRefused
    or UnknownHost, which are ConnectErrors: nothing was sent. `Host` and TLS server name remain those of the URL. The
    connect timeout covers resolving and all attempts.
    """

    def __init__(self, allow: AllowAddress, *, tls: ssl.SSLContext, resolver: Resolver = resolve_host) -> None:
        self._allow = allow
        self._resolve = resolver
        self._inner = _UnbufferedTransport(tls)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        host = request.url.raw_host.decode("ascii").lower()
        port = request.url.port or (WEB_PORT_TLS if request.url.scheme == "https" else WEB_PORT)
        timeout: dict[str, Any] = request.extensions.get("timeout", {})
        seconds: float | None = timeout.get("connect")
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            async with asyncio.timeout(seconds):
                addresses = await self._resolve(host)
        except TimeoutError:
            raise httpx2.ConnectTimeout(f"{host} could not be resolved in time") from None
        allowed = [ip for ip in addresses if not is_metadata(ip) and self._allow(host, port, ip)]
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
