"""HTTP/1.1 server for an ASGI application: accepts connections, ends idle ones, and stops without losing a request.

uvloop's own server accepts one connection per iteration of the loop.
"""

from __future__ import annotations

import asyncio
import ctypes
import resource
import socket
import struct
from contextlib import suppress
from email.utils import formatdate
from heapq import nsmallest
from typing import Any, cast

from uvicorn.config import Config

from service.http_protocol import App, BuildRefusal, HttpProtocol, Limits, ServerContext, build_text_refusal

_SWEEP_SECONDS = 1.0
_MAX_ACCEPTS_PER_ITERATION = 128
_CLOSED_SHARE = 64
"""At the limit of connections, this part of them makes room if idle."""
_BACKLOG = 1024
_MAX_DESCRIPTORS = 65_536
_CANCEL_SECONDS = 5.0
_USER_TIMEOUT_MS = 60_000
_UNSENT_BYTES = 128 * 1024
_HANDSHAKE_SECONDS = 0.1
"""For this long before a listening socket is closed, handshakes go on and none is begun."""
_SO_ATTACH_FILTER = 26
_DROP_SYN = struct.pack(
    "HBBI" * 5,
    *(0x30, 0, 0, 13),  # load the flags of the TCP header
    *(0x54, 0, 0, 0x12),  # keep SYN and ACK
    *(0x15, 0, 1, 0x02),  # SYN alone: the next instruction, else the one after it
    *(0x06, 0, 0, 0),  # drop
    *(0x06, 0, 0, 0xFFFF_FFFF),  # pass
)
"""A filter of the kernel (socket(7), SO_ATTACH_FILTER): packets that open a connection are dropped.

Their clients repeat them after a second and are refused then. Without it, closing the socket would reset connections
whose handshake ends just then, and whose clients may have sent a request.
"""


def raise_descriptor_limit() -> int:
    """Raise the limit of open descriptors as far as the system allows; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address. Raises OSError, or UnicodeError for an invalid host name."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it: ends those whose client reads nothing
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # inherited too: the kernel would hold up to 4 MB for each slow reader
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
    return listening


def _drop_handshakes(listener: socket.socket) -> bool:
    """Begin no further handshakes; return whether the system can do that."""
    program = ctypes.create_string_buffer(_DROP_SYN, len(_DROP_SYN))
    option = struct.pack("HP", len(_DROP_SYN) // 8, ctypes.addressof(program))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option)
    except OSError:
        return False
    return True


def base_url(listener: socket.socket) -> str:
    """Return the URL at which this machine reaches a listening socket."""
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


class HttpServer:
    """A server of one application on one listening socket, in the running event loop."""

    def __init__(
        self,
        app: App,
        *,
        limits: Limits = Limits(),
        build_refusal: BuildRefusal = build_text_refusal,
        protocol: type[HttpProtocol] | None = None,
    ) -> None:
        config = Config(
            cast("Any", app),
            interface="asgi3",
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            reset_contextvars=True,  # a pipelined request starts within the response to the one before it
        )
        config.load()
        self._limits = limits
        self._context = ServerContext(
            config=config, limits=limits, build_refusal=build_refusal, on_connection_lost=self._on_connection_lost
        )
        self._state = self._context.state
        self._protocol = protocol or HttpProtocol
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = None
        self._is_accepting = False
        self._opening_tasks: set[asyncio.Task[Any]] = set()
        self._connection_lost = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def connections(self) -> set[HttpProtocol]:
        return cast("set[HttpProtocol]", self._state.connections)

    def start(self, listener: socket.socket) -> None:
        """Serve on a listening socket and take ownership of it."""
        listener.setblocking(False)
        self._listener = listener
        self._start_accepting()
        self._sweep()

    async def stop(self, grace_seconds: float = 0) -> None:
        """Stop listening, finish the requests that clients have sent, and cut off those left after the grace period."""
        self._context.is_stopping = True
        for connection in list(self.connections):
            connection.end_after_response()
        if self._listener:
            if grace_seconds and _drop_handshakes(self._listener):
                await asyncio.sleep(_HANDSHAKE_SECONDS)
            while self._accept_connections():
                pass  # closing the socket would reset the connections in the kernel's queue
            self._stop_accepting()
            self._listener.close()
            self._listener = None
        idle_timer = self._loop.call_later(min(grace_seconds, self._limits.last_request_seconds), self._close_idle)
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await self._wait_closed()
        idle_timer.cancel()
        self._close_idle()
        for connection in list(self.connections):
            connection.abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CANCEL_SECONDS):
                await self._wait_closed()
        for task in self._state.tasks:
            task.cancel()
        await self._wait_closed()
        if self._sweeper:
            self._sweeper.cancel()

    def _close_idle(self) -> None:
        self._context.closes_idle = True
        for connection in list(self.connections):
            connection.close_if_idle()

    async def _wait_closed(self) -> None:
        while self._opening_tasks:
            await asyncio.wait(self._opening_tasks)
        while self.connections:
            self._connection_lost.clear()
            await self._connection_lost.wait()
        while self._state.tasks:
            await asyncio.wait(self._state.tasks)

    def _on_connection_lost(self) -> None:
        self._connection_lost.set()
        if not self._context.is_stopping:
            self._start_accepting()

    def _start_accepting(self) -> None:
        if self._listener and not self._is_accepting:
            self._is_accepting = True
            self._loop.add_reader(self._listener, self._accept_connections)

    def _stop_accepting(self) -> None:
        if self._listener and self._is_accepting:
            self._is_accepting = False
            self._loop.remove_reader(self._listener)

    def _accept_connections(self) -> bool:
        """Accept many connections at once: under load an iteration of the loop takes long.

        Return whether the next iteration has to continue.
        """
        for accepted_before in range(_MAX_ACCEPTS_PER_ITERATION):
            if len(self.connections) + len(self._opening_tasks) >= self._limits.connections:
                if accepted_before:
                    return True
                if not self._close_longest_idle():
                    self._stop_accepting()  # until a connection ends
                    return False
            try:
                accepted, _ = cast("socket.socket", self._listener).accept()
            except BlockingIOError:
                return False
            except ConnectionAbortedError:
                continue
            except OSError as error:  # out of descriptors or memory
                self._loop.call_exception_handler({"message": "A connection can't be accepted.", "exception": error})
                self._close_longest_idle()
                self._stop_accepting()  # until the next sweep: the socket stays readable
                return False
            accepted.setblocking(False)
            opening_task = self._loop.create_task(self._open_connection(accepted))
            self._opening_tasks.add(opening_task)
            opening_task.add_done_callback(self._opening_tasks.discard)
        return True

    async def _open_connection(self, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: self._protocol(self._context), accepted)
        except OSError:  # the client has disconnected
            accepted.close()

    def _close_longest_idle(self) -> bool:
        """End the connections that have been idle for longest; return whether there are any.

        Several at once, since finding them takes milliseconds if there are many. Those with an unread response come
        last, and are cut off: closed after it, they would keep their descriptors beside those that replace them.
        """
        idle = nsmallest(
            max(self._limits.connections // _CLOSED_SHARE, 1),
            (connection for connection in self.connections if connection.is_idle),
            key=lambda connection: (connection.has_unread_data, connection.deadline),
        )
        for connection in idle:
            connection.abort()
        return bool(idle)

    def _sweep(self) -> None:
        """Expire connections once a second, so that a request needs no timer."""
        self._sweeper = self._loop.call_later(_SWEEP_SECONDS, self._sweep)
        self._state.default_headers[:] = [(b"date", formatdate(usegmt=True).encode())]  # also of open responses
        now = self._loop.time()
        for connection in list(self.connections):
            if connection.deadline <= now:
                connection.expire()
            if connection.read_deadline <= now:
                connection.drop_slow_reader()
        if not self._context.is_stopping:
            self._start_accepting()
