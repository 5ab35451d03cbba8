"""A connection to an upstream: carries a request and its response, and then perhaps the next ones."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
from collections.abc import Iterable
from ipaddress import ip_address
from typing import cast

from aiohappyeyeballs import start_connection

from service.clients.forms import Piece
from service.clients.network import Deadline, local_error_reason
from service.clients.response_parser import ResponseParser
from service.domain.hosts import is_metadata

CONNECT_SECONDS = 5.0
"""Time limit of a connection with the look-up of its name, and of its TLS handshake."""
NEXT_ADDRESS_SECONDS = 0.25
"""After this time without a connection the next address is tried beside (RFC 8305, 8)."""
WRITE_SECONDS = 30.0
"""Time limit of each piece of a request."""
READ_SECONDS = 30.0
"""Time limit of the response head and of each part of the body."""
ERROR_BODY_SECONDS = 5.0
"""Time limit of the body of an error response: it only explains the status."""
KEEP_ALIVE_SECONDS = 15.0


class NotSent(Exception):
    """Nothing of the request was sent."""


class ConnectFailed(NotSent):
    """There is no connection, and this machine is not the reason."""


async def connect(host: str, port: int, tls: ssl.SSLContext | None) -> Connection:
    """Connect to a server, but never to a metadata service, whatever name leads there. Raises NotSent."""
    loop = asyncio.get_running_loop()
    connected: socket.socket | None = None
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            allowed = [address for address in addresses if not is_metadata(ip_address(address[4][0]))]
            if not allowed:
                raise NotSent("its address is a metadata service")
            connected = await start_connection(allowed, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS)
        _, connection = await loop.create_connection(
            Connection,
            sock=connected,
            ssl=tls,
            server_hostname=host if tls else None,
            ssl_handshake_timeout=CONNECT_SECONDS if tls else None,
        )
        connected = None
    except (OSError, RuntimeError, UnicodeError) as error:
        if reason := local_error_reason(error):
            raise NotSent(reason) from error
        raise ConnectFailed(type(error).__name__) from error
    finally:
        if connected is not None:  # else it belongs to the connection
            connected.close()
    return connection


class Connection(asyncio.Protocol):
    """A connection for one request at a time.

    `send` and `receive` take the deadline of the request, which they bring forward while nothing moves. Their errors
    are those of the deadline: a broken connection ends the response.
    """

    def __init__(self) -> None:
        self.response = ResponseParser()
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._is_idle = self._is_paused = self._is_closed = self._is_answered_early = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        # `send` ends when all is written. With 0, TLS connections of uvloop would pause for ever.
        self._transport.set_write_buffer_limits(1)

    async def send(self, pieces: Iterable[Piece], deadline: Deadline) -> None:
        """Send a request, unless it is refused before its end or the connection breaks."""
        for piece in pieces:
            if self._is_closed:
                return
            self._transport.writelines(piece)
            if self._is_paused:
                deadline.reset_idle_timeout(WRITE_SECONDS)
            while self._is_paused:
                if self._is_refused:
                    self.abort()
                    return
                await self._wait_for_event()
        self._is_answered_early = self.response.status is not None

    @property
    def _is_refused(self) -> bool:
        return self._is_closed or (self.response.has_ended and (self.response.status or 0) >= 400)

    async def receive(self, deadline: Deadline) -> None:
        """Wait for the end of the response."""
        deadline.reset_idle_timeout(READ_SECONDS)
        while self.response.status is None and not self.response.has_ended:
            await self._wait_for_event()
        if not self.response.has_ended and not 200 <= (self.response.status or 0) < 300:
            deadline.limit(ERROR_BODY_SECONDS)
        while not self.response.has_ended:
            deadline.reset_idle_timeout(READ_SECONDS)
            await self._wait_for_event()

    async def _wait_for_event(self) -> None:
        """Wait until data has arrived, more may be written, or the connection is closed."""
        self._waiter = self._loop.create_future()
        await self._waiter

    @property
    def is_open(self) -> bool:
        return not self._is_closed

    @property
    def is_quiet(self) -> bool:
        """Whether it is open, and the server has neither sent more nor closed it since the event loop last read."""
        if self._is_closed:
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    @property
    def is_reusable(self) -> bool:
        return self.response.has_ended and self.response.is_reusable and not self._is_closed

    def keep(self) -> None:
        """Keep an idle connection for the next request, for a time."""
        self._is_idle = True
        self._expiry = self._loop.call_later(KEEP_ALIVE_SECONDS, self.abort)

    def reuse(self) -> None:
        """Begin the next request."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._is_idle = False
        self.response = ResponseParser()

    def end(self) -> None:
        """Close after a request.

        A server that answered early still reads: over TLS up to 64 KB of the request are not yet written.
        """
        if self._is_answered_early and self.response.has_ended and not self._is_closed:
            self.keep()
        else:
            self.abort()

    def abort(self) -> None:
        """Close at once: `close` would wait until the server has read what was written."""
        self._is_closed = True
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._is_idle:
            self.abort()
        else:
            self.response.feed(data)
            self._notify()

    def eof_received(self) -> None:
        self._on_closed(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_closed(exc)
        if self._expiry is not None:
            self._expiry.cancel()

    def _on_closed(self, error: Exception | None) -> None:
        self._is_closed = True
        self.response.finish(error)
        self._notify()

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._notify()

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
