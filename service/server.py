"""HTTP/1.1 server for an ASGI application: uvicorn's httptools protocol with limits.

uvicorn reads the body of a request that offers an `Upgrade` as another request (Kludex/uvicorn#2722), sends chunks to
HTTP/1.0 clients (#1360), and limits neither size nor duration of a request head. uvloop's own server accepts one
connection per iteration of the loop. This module imports nothing of the package.
"""

from __future__ import annotations

import asyncio
import ctypes
import resource
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from heapq import nsmallest
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

App = Callable[[Any, Any, Any], Awaitable[None]]
BuildRefusal = Callable[[int, str, str], tuple[Iterable[tuple[bytes, bytes]], bytes]]
"""Builds the response to a request that never reaches the application.

Takes status, detail and client address; returns header fields, without those of the connection, and body.
"""
_SWEEP_SECONDS = 1.0
_MAX_ACCEPTS_PER_ITERATION = 128
_SILENT_SECONDS = 1.0
_CLOSED_SHARE = 64
"""At the limit of connections, this part of them makes room if idle."""
_BACKLOG = 1024
_MAX_DESCRIPTORS = 65_536
_CANCEL_SECONDS = 5.0
_CHUNKS_TO_JOIN = 1_000
_DISCARD_DELAY_SECONDS = 0.25
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
CLIENT_TOO_SLOW = "client_too_slow"
"""Key in an ASGI scope: the connection was ended because the client read too slowly."""


@dataclass(frozen=True)
class Limits:
    """Limits of one port."""

    connections: int = 10_000
    """Further ones replace idle or silent ones, or wait in the kernel's queue."""
    head_bytes: int = 32 * 1024
    """Of request line and header fields together, and of the trailer fields."""
    head_fields: int = 100
    """Number of header fields, and of trailer fields."""
    pipelined_requests: int = 100
    """Requests that wait for the response to the one before them."""
    head_seconds: float = 10
    """From the opening of a connection, or the first byte of a further request, to the end of the head."""
    idle_seconds: float = 75
    """Longer than clients and load balancers keep an idle connection, which would send a request into its close."""
    discard_seconds: float = 30
    """How long the rest of a refused body is discarded: closing on unread bytes resets the connection, and the client
    would lose the response."""
    discard_idle_seconds: float = 5
    """How long discarding goes on without a byte."""
    last_request_seconds: float = 1
    """How long an idle connection stays open once the server stops: a client may have sent a request already."""
    reader_seconds: float = 30
    """How long a client may be behind `reader_bytes_per_second` with what is written but not sent."""
    reader_bytes_per_second: int = 32 * 1024


@dataclass(kw_only=True, eq=False, repr=False)
class ServerContext:
    """What the connections of a server share."""

    config: Config
    limits: Limits
    build_refusal: BuildRefusal
    on_connection_lost: Callable[[], None]
    state: ServerState = field(default_factory=ServerState)
    is_stopping: bool = False
    closes_idle: bool = False


def build_text_refusal(_status: int, detail: str, _client: str) -> tuple[Iterable[tuple[bytes, bytes]], bytes]:
    return [(b"content-type", b"text/plain; charset=utf-8")], f"{detail}\n".encode()


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


class _Cycle(RequestResponseCycle):
    """A request and its response. The body is passed on in the parts that the parser made: uvicorn copies it twice."""

    chunks: list[bytes] | None = None
    """What was received and not yet read by the application; no list is made for a request without a body."""
    _chunk_bytes = 0

    def add_chunk(self, chunk: bytes) -> None:
        if self.chunks is None:
            self.chunks = []
        self.chunks.append(chunk)
        if len(self.chunks) == _CHUNKS_TO_JOIN:
            self.chunks = [b"".join(self.chunks)]  # each has an overhead of some 40 bytes
        self._chunk_bytes += len(chunk)
        if self._chunk_bytes > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self.message_event.set()

    async def receive(self) -> Any:
        message: Any = await super().receive()
        if message["type"] == "http.request" and self.chunks:
            message["body"] = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
            self.chunks, self._chunk_bytes = None, 0
        return message


class _GuardedCycle(_Cycle):
    """A response to HTTP/1.0, or to a client that waits for `100 Continue`."""

    _ends_with_connection = False

    async def send(self, message: Any) -> None:
        if not self.response_started:
            if self.waiting_for_100_continue:
                self.keep_alive = False  # the client may send the body or the next request
            header_names = {name.lower() for name, _ in message.get("headers", ())}
            if self.scope["http_version"] == "1.0" and b"content-length" not in header_names:
                self.chunked_encoding = False
                self._ends_with_connection = True
        elif self._ends_with_connection:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


class _RefusedError(Exception):
    """A refusal on its way through the callbacks of the parser."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class HttpProtocol(HttpToolsProtocol):
    """One connection; also the transport of its responses."""

    cycle: _Cycle

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context.config, context.state, {})
        self.access_log = False
        self.deadline = self.read_deadline = float("inf")  # expiry in seconds of the loop's clock
        self._context = context
        self._limits = context.limits
        self._active_cycle: _Cycle | None = None
        self._has_had_request = False
        self._is_in_head = False
        self._is_request_complete = True  # no request is being received
        self._offers_upgrade = False
        self._is_lingering = False
        self._discard_ends_at = float("inf")
        self._head_bytes = self._head_fields = 0
        self._framing_bytes = 0  # received since the last head or part of a body
        self._pending_refusal: tuple[int, str] | None = None  # sent after the responses in progress
        self._reader_seconds = context.limits.reader_seconds  # what is left of them

    @property
    def is_idle(self) -> bool:
        """Whether no request is expected at once: a new connection is idle after a second without a byte."""
        return (
            (self._has_had_request or self.deadline - self.loop.time() < self._limits.head_seconds - _SILENT_SECONDS)
            and self._active_cycle is None
            and self._is_request_complete
            and not self.transport.is_closing()
        )

    @property
    def has_unread_data(self) -> bool:
        return self.transport.get_write_buffer_size() > 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self.write = transport.write
        self.deadline = self.loop.time() + self._limits.head_seconds
        if self._context.closes_idle:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._active_cycle:  # uvicorn handles only the last received cycle
            self._active_cycle.disconnected = True
            self._active_cycle.message_event.set()
        self.cycle = self._active_cycle = None  # type: ignore[assignment] # break the reference cycle
        self._context.on_connection_lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._limit_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reader_seconds = min(self.read_deadline - self.loop.time(), self._limits.reader_seconds)
        self.read_deadline = float("inf")
        if self.transport.is_closing():
            self._limit_reader()

    def _limit_reader(self) -> None:
        """Set the time by which the client must have read what is written."""
        seconds = self.transport.get_write_buffer_size() / self._limits.reader_bytes_per_second
        self.read_deadline = self.loop.time() + self._reader_seconds + seconds

    def drop_slow_reader(self) -> None:
        if self._active_cycle:
            cast("dict[str, Any]", self._active_cycle.scope)[CLIENT_TOO_SLOW] = True
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._is_lingering:
            self._extend_discard_deadline()
            return
        if self._pending_refusal:
            return
        self._framing_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            # The error of a callback is the context of the parser's error.
            if isinstance(error.__context__, _RefusedError):
                self._refuse_request(error.__context__.status, error.__context__.detail)
            else:
                self._refuse_request(400, "The request is not valid HTTP/1.1.")
        else:
            if self._framing_bytes > 2 * self._limits.head_bytes:  # a head has more bytes than are counted
                self._refuse_request(*self._head_too_large())
            elif self._active_cycle is None and not self._is_request_complete and not self._is_in_head:
                self._extend_discard_deadline()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._is_request_complete = False
        self._head_bytes = self._head_fields = 0
        if self._active_cycle is None:
            self.deadline = self.loop.time() + self._limits.head_seconds

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._head_bytes += len(url)
        if self._head_bytes > self._limits.head_bytes:
            raise _RefusedError(*self._head_too_large())

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_fields += 1
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self._limits.head_bytes or self._head_fields > self._limits.head_fields:
            raise _RefusedError(*self._head_too_large())
        if self._is_in_head:  # a trailer field must not become a header field
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._offers_upgrade = True  # and the parser raises HttpParserUpgrade after the head
            return
        version, method = self.parser.get_http_version(), self.parser.get_method()
        self._check_head(version)
        url = httptools.parse_url(self.url)
        raw_path = url.path or b"/"
        path = raw_path.decode("ascii")
        self._has_had_request = True
        self._is_in_head = False
        self._head_bytes = self._head_fields = self._framing_bytes = 0
        self.scope["method"] = method.decode("ascii")
        self.scope["http_version"] = version
        self.scope["path"] = unquote(path) if "%" in path else path
        self.scope["raw_path"] = raw_path
        self.scope["query_string"] = url.query or b""
        cycle = _GuardedCycle if version == "1.0" or self.expect_100_continue else _Cycle
        self.cycle = cycle(
            scope=self.scope,
            transport=cast("Any", self),
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and self.parser.should_keep_alive() and not self._context.is_stopping,
            on_response=self.on_response_complete,
        )
        if self._active_cycle:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))
        else:
            self._start_asgi_task(self.cycle, self.app)

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        if not self.cycle.response_complete:
            self.cycle.add_chunk(body)

    def on_message_complete(self) -> None:
        if self._offers_upgrade:
            return
        if self.cycle.keep_alive and not self.parser.should_keep_alive():  # the parser would ignore further requests
            raise _RefusedError(400, "Connection must not be a trailer field.")
        self._framing_bytes = 0
        self._is_request_complete = True
        super().on_message_complete()
        if self._active_cycle is None:
            self._wait_for_client()

    def on_response_complete(self) -> None:
        if self._active_cycle:
            self._active_cycle.chunks = None  # nothing will read it
        self._active_cycle = None
        self.server_state.total_requests += 1
        if self.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._pending_refusal:
            self._send_refusal(*self._pending_refusal)
        else:
            self._wait_for_client()

    def end_after_response(self) -> None:
        """Close after the response in progress, if any."""
        if self._active_cycle:
            self.cycle.keep_alive = False

    def close_if_idle(self) -> None:
        """Close unless a request is in progress."""
        if self._active_cycle is None and (self._is_request_complete or self._is_in_head):
            self._close_transport()

    def is_closing(self) -> bool:
        return self._is_lingering or self.transport.is_closing()

    def close(self) -> None:
        """Close after a response."""
        if self._is_request_complete:
            self._close_transport()
        else:
            self._linger()

    def _close_transport(self) -> None:
        """Close after the written data, which the client must read in time."""
        self.transport.close()
        if self.read_deadline == float("inf"):
            self._limit_reader()

    def abort(self) -> None:
        self.transport.abort()

    def expire(self) -> None:
        """End a connection whose deadline has passed; once, since written data may take time to leave."""
        self.deadline = float("inf")
        if self._is_in_head and not self._is_lingering:
            seconds = f"{self._limits.head_seconds:g}"
            self._send_refusal(400, f"The head of the request did not arrive within {seconds} s.", linger=False)
        elif self._is_request_complete:
            self._close_transport()
        else:
            self.transport.abort()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active_cycle = cast("_Cycle", cycle)
        self.deadline = float("inf")  # the application limits the time of body and response
        super()._start_asgi_task(cycle, app)

    def _wait_for_client(self) -> None:
        """Set a deadline for the client's next data while no response is in progress."""
        now = self.loop.time()
        if self._context.closes_idle:
            self.close_if_idle()
        if self._is_in_head:
            self.deadline = now + self._limits.head_seconds
        elif self._is_request_complete:
            self.deadline = now + self._limits.idle_seconds
        else:
            self._discard_ends_at = now + self._limits.discard_seconds
            self._extend_discard_deadline()

    def _extend_discard_deadline(self) -> None:
        self.deadline = min(self._discard_ends_at, self.loop.time() + self._limits.discard_idle_seconds)

    def _linger(self) -> None:
        """Close after the written data, discarding input so that the client can read the response."""
        if self.transport.is_closing():
            return
        self._is_lingering = True
        self._discard_ends_at = self.loop.time() + self._limits.discard_seconds
        self._extend_discard_deadline()
        # Most clients read the response and close meanwhile, instead of sending all that they have.
        self.flow.pause_reading()
        self.loop.call_later(_DISCARD_DELAY_SECONDS, self._resume_discarding)
        self.transport.write_eof()

    def _resume_discarding(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _head_too_large(self) -> tuple[int, str]:
        limits = self._limits
        return 431, f"The header fields exceed {limits.head_bytes} bytes or {limits.head_fields} fields."

    def _check_head(self, version: str) -> None:
        """Refuse excessive requests and those that a proxy in front might frame or route differently."""
        if len(self.pipeline) >= self._limits.pipelined_requests:
            raise _RefusedError(400, f"More than {self._limits.pipelined_requests} requests wait for their responses.")
        if version not in {"1.0", "1.1"}:
            raise _RefusedError(400, "Use HTTP/1.1.")
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (version == "1.1" and not hosts):
            raise _RefusedError(400, "The request must have one Host field.")
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (version == "1.0" or [coding.lower() for coding in codings] != [b"chunked"]):
            raise _RefusedError(400, "The only transfer coding supported is chunked, in HTTP/1.1.")

    def _decline_upgrade(self, rest: bytes) -> None:
        """Parse the head again without the offer, as an ordinary request (RFC 9110, 7.8).

        httptools takes the body for the other protocol (MagicStack/httptools#124).
        """
        self._offers_upgrade = False
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse_request(400, "CONNECT is not supported.")
            return
        fields = [b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        head = b"".join([method, b" ", self.url, b" HTTP/", version, b"\r\n", *fields, b"\r\n"])
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._framing_bytes = 0
        self.data_received(head)
        if rest and not self.transport.is_closing():
            self.data_received(rest)

    def _refuse_request(self, status: int, detail: str) -> None:
        """Respond in place of the application, after the responses to earlier requests."""
        # Otherwise the error is in the body of the last received request.
        is_in_next = self._is_in_head or self._is_request_complete
        self._is_request_complete = False
        if self._active_cycle and (is_in_next or self._active_cycle is not self.cycle):
            if not is_in_next:
                self.pipeline.popleft()
            self._pending_refusal = status, detail
            self.flow.pause_reading()
        elif not is_in_next and self.cycle.response_complete:
            self._linger()
        elif not is_in_next and self.cycle.response_started:
            self.transport.abort()
        else:
            if self._active_cycle:
                self._active_cycle.disconnected = True
                self._active_cycle.message_event.set()
            self._send_refusal(status, detail)

    def _send_refusal(self, status: int, detail: str, *, linger: bool = True) -> None:
        fields, body = self._context.build_refusal(status, detail, self.client[0] if self.client else "")
        length = (b"content-length", str(len(body)).encode())
        head = [*self.server_state.default_headers, *fields, length, (b"connection", b"close")]
        self.transport.write(b"".join([STATUS_LINE[status], *(b"%s: %s\r\n" % field for field in head), b"\r\n", body]))
        if linger:
            self._linger()
        else:
            self._close_transport()
